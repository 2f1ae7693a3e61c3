"""Architectures without weights, for studies of costs: ``model=config:NAME``."""

from typing import Any

from droppeft.errors import DroppeftError


def _sized(
    model_type: str, layers: int, width: int, heads: int, inner: int, **others: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **others,
    }


_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_DEBERTA = {
    **{"vocab_size": 128100, "type_vocab_size": 0, "relative_attention": True},
    **{"position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    **{"pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
}
_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8}
_QWEN2 = {"vocab_size": 151936, "num_key_value_heads": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert-large": _sized("bert", 24, 1024, 16, 4096),
    "roberta-large": _sized("roberta", 24, 1024, 16, 4096, **_ROBERTA),
    "deberta-v3-large": _sized("deberta-v2", 24, 1024, 16, 4096, **_DEBERTA),
    "llama-1b": _sized("llama", 16, 2048, 32, 8192, **_LLAMA3),
    "llama-3b": _sized("llama", 28, 3072, 24, 8192, **_LLAMA3),
    "llama-7b": _sized("llama", 32, 4096, 32, 11008, **_LLAMA2),
    "llama-13b": _sized("llama", 40, 5120, 40, 13824, **_LLAMA2),
    "qwen2-1.5b": _sized("qwen2", 28, 1536, 12, 8960, **_QWEN2),
}
"""Configurations of models with random weights, for studies of costs, by name. Their texts are
tokenised by the built-in tokenizer."""


def architecture(name: str) -> dict[str, Any]:
    """Arguments of transformers' ``AutoConfig.for_model``.

    Args:
        name: a key of :data:`ARCHITECTURES`.

    Raises:
        DroppeftError: an unknown name.
    """
    if name not in ARCHITECTURES:
        raise DroppeftError(
            f"model=config:{name}: unknown architecture; known are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]
