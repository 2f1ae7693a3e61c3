"""Where the blocks of each architecture are, and what a dropped block has to return.

Source: the model code of transformers 5.23. The tests compare each entry with models that are built
without the dropped blocks; ``docs/reference/architectures.md`` shows the results.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a block's forward."""


def hidden_of(call: Arguments) -> torch.Tensor:
    """Return the hidden states (B, S, H) of a call, which are always the first argument."""
    args, kwargs = call
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_hidden(call: Arguments, hidden: torch.Tensor) -> Arguments:
    """Return the same call with other hidden states."""
    args, kwargs = call
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def cache_of(call: Arguments) -> Any:
    """Return the key-value cache among the arguments of a call, or ``None`` if there is none."""
    args, kwargs = call
    values = (*kwargs.values(), *args)
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def _tensor(block: nn.Module, call: Arguments) -> torch.Tensor:
    return hidden_of(call)


def _tuple(block: nn.Module, call: Arguments) -> tuple[Any, ...]:
    return hidden_of(call), None


def _position_bias(block: nn.Module, call: Arguments) -> tuple[Any, ...]:
    """T5: the first block of a stack computes the position biases that all later blocks use.

    The bias of cross-attention is not computed: it is zero, and a block that does not receive it
    creates it.
    """
    (args, kwargs), hidden = call, hidden_of(call)
    position_bias = args[2] if len(args) > 2 else kwargs.get("position_bias")
    cross_bias = args[5] if len(args) > 5 else kwargs.get("encoder_decoder_position_bias")
    if position_bias is None:
        attention: Any = block.get_submodule("layer.0.SelfAttention")
        cache, length = cache_of(call), hidden.shape[1]
        past = 0 if cache is None else cache.get_seq_length(attention.layer_idx)
        position_bias = attention.compute_bias(
            length, past + length, device=hidden.device, past_seen_tokens=past
        )
    return hidden, position_bias, cross_bias


DROPPED_OUTPUTS: dict[str, Callable[[nn.Module, Arguments], Any]] = {
    "tensor": _tensor,
    "tuple": _tuple,
    "position bias": _position_bias,
}
"""By name, the function that computes a dropped block's output from the block and its arguments.

``tensor``: the input hidden states. ``tuple``: these, and ``None`` in place of attention weights.
``position bias``: these, and the position biases that later blocks need.
"""


class Architecture(NamedTuple):
    """How to drop layers of models with one ``config.model_type``.

    Attributes:
        stacks: for each list of blocks, in the order of execution, its dotted name relative to the
            base model, and the name of the configuration's entry that holds its length.
        blocks: class names of the blocks.
        output: what a dropped block returns, a key of :data:`DROPPED_OUTPUTS`.
    """

    stacks: Mapping[str, str]
    blocks: tuple[str, ...]
    output: str = "tensor"


def _encoder(block: str, output: str = "tensor") -> Architecture:
    return Architecture({"encoder.layer": "num_hidden_layers"}, (block,), output)


def _layers(block: str) -> Architecture:
    return Architecture({"layers": "num_hidden_layers"}, (block,))


def _h(block: str, output: str = "tensor") -> Architecture:
    return Architecture({"h": "num_hidden_layers"}, (block,), output)


def _encoder_decoder(block: str) -> Architecture:
    stacks = {"encoder.layers": "encoder_layers", "decoder.layers": "decoder_layers"}
    return Architecture(stacks, (f"{block}EncoderLayer", f"{block}DecoderLayer"))


def _t5(block: str, output: str) -> Architecture:
    stacks = {"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"}
    return Architecture(stacks, (block,), output)


ARCHITECTURES: dict[str, Architecture] = {
    # Encoders
    "bert": _encoder("BertLayer"),
    "big_bird": _encoder("BigBirdLayer"),
    "camembert": _encoder("CamembertLayer"),
    "convbert": _encoder("ConvBertLayer"),
    "data2vec-text": _encoder("Data2VecTextLayer"),
    "deberta": _encoder("DebertaLayer", "tuple"),
    # Also DeBERTa-v3. The optional convolution after block 0 belongs to the encoder, not to the
    # block: if block 0 is dropped, it still runs, on the input of block 0.
    "deberta-v2": _encoder("DebertaV2Layer", "tuple"),
    "distilbert": Architecture({"transformer.layer": "n_layers"}, ("TransformerBlock",)),
    "electra": _encoder("ElectraLayer"),
    "ernie": _encoder("ErnieLayer"),
    "esm": _encoder("EsmLayer"),
    "eurobert": _layers("EuroBertDecoderLayer"),
    "megatron-bert": _encoder("MegatronBertLayer", "tuple"),
    "modernbert": _layers("ModernBertEncoderLayer"),
    "mpnet": _encoder("MPNetLayer", "tuple"),
    "nomic_bert": _layers("NomicBertLayer"),
    "nystromformer": _encoder("NystromformerLayer", "tuple"),
    "rembert": _encoder("RemBertLayer", "tuple"),
    "roberta": _encoder("RobertaLayer"),
    "roberta-prelayernorm": _encoder("RobertaPreLayerNormLayer"),
    "roformer": _encoder("RoFormerLayer", "tuple"),
    "xlm-roberta": _encoder("XLMRobertaLayer"),
    "xlm-roberta-xl": _encoder("XLMRobertaXLLayer"),
    "xmod": _encoder("XmodLayer"),
    # Decoders
    "apertus": _layers("ApertusDecoderLayer"),
    "arcee": _layers("ArceeDecoderLayer"),
    "biogpt": _layers("BioGptDecoderLayer"),
    "bloom": _h("BloomBlock", "tuple"),
    "codegen": _h("CodeGenBlock", "tuple"),
    "cohere": _layers("CohereDecoderLayer"),
    "cohere2": _layers("Cohere2DecoderLayer"),
    "deepseek_v3": _layers("DeepseekV3DecoderLayer"),
    "diffllama": _layers("DiffLlamaDecoderLayer"),
    "ernie4_5": _layers("Ernie4_5DecoderLayer"),
    "exaone4": _layers("Exaone4DecoderLayer"),
    "falcon": _h("FalconDecoderLayer", "tuple"),
    "gemma": _layers("GemmaDecoderLayer"),
    "gemma2": _layers("Gemma2DecoderLayer"),
    # The model also has a vision tower, whose layers always run.
    "gemma3": Architecture(
        {"language_model.layers": "text_config.num_hidden_layers"}, ("Gemma3DecoderLayer",)
    ),
    "gemma3_text": _layers("Gemma3DecoderLayer"),
    "glm": _layers("GlmDecoderLayer"),
    "glm4": _layers("Glm4DecoderLayer"),
    "gpt2": _h("GPT2Block"),
    "gpt_bigcode": _h("GPTBigCodeBlock"),
    "gpt_neo": _h("GPTNeoBlock", "tuple"),
    "gpt_neox": _layers("GPTNeoXLayer"),
    "gpt_oss": _layers("GptOssDecoderLayer"),
    "gptj": _h("GPTJBlock", "tuple"),
    "granite": _layers("GraniteDecoderLayer"),
    "granitemoe": _layers("GraniteMoeDecoderLayer"),
    "helium": _layers("HeliumDecoderLayer"),
    "llama": _layers("LlamaDecoderLayer"),
    "ministral": _layers("MinistralDecoderLayer"),
    "mistral": _layers("MistralDecoderLayer"),
    "mixtral": _layers("MixtralDecoderLayer"),
    "mpt": Architecture({"blocks": "n_layers"}, ("MptBlock",), "tuple"),
    "nemotron": _layers("NemotronDecoderLayer"),
    "olmo": _layers("OlmoDecoderLayer"),
    "olmo2": _layers("Olmo2DecoderLayer"),
    "olmo3": _layers("Olmo3DecoderLayer"),
    "olmoe": _layers("OlmoeDecoderLayer"),
    "opt": _layers("OPTDecoderLayer"),
    "persimmon": _layers("PersimmonDecoderLayer"),
    "phi": _layers("PhiDecoderLayer"),
    "phi3": _layers("Phi3DecoderLayer"),
    "phimoe": _layers("PhimoeDecoderLayer"),
    "qwen2": _layers("Qwen2DecoderLayer"),
    "qwen2_moe": _layers("Qwen2MoeDecoderLayer"),
    "qwen3": _layers("Qwen3DecoderLayer"),
    "qwen3_moe": _layers("Qwen3MoeDecoderLayer"),
    "seed_oss": _layers("SeedOssDecoderLayer"),
    "smollm3": _layers("SmolLM3DecoderLayer"),
    "stablelm": _layers("StableLmDecoderLayer"),
    "starcoder2": _layers("Starcoder2DecoderLayer"),
    "xglm": _layers("XGLMDecoderLayer"),
    # Encoder-decoders
    "bart": _encoder_decoder("Bart"),
    "blenderbot": _encoder_decoder("Blenderbot"),
    "blenderbot-small": _encoder_decoder("BlenderbotSmall"),
    "m2m_100": _encoder_decoder("M2M100"),
    "marian": _encoder_decoder("Marian"),
    "mbart": _encoder_decoder("MBart"),
    "mt5": _t5("MT5Block", "position bias"),
    "pegasus": _encoder_decoder("Pegasus"),
    "plbart": _encoder_decoder("PLBart"),
    "t5": _t5("T5Block", "position bias"),
    "umt5": _t5("UMT5Block", "tensor"),
    # Vision
    "deit": _layers("DeiTLayer"),
    "dinov2": _encoder("Dinov2Layer"),
    "vit": _layers("ViTLayer"),
    "vit_msn": _layers("ViTMSNLayer"),
}
"""By ``config.model_type``. A new entry also needs a case in ``tests/architecture_contract.py``."""

_SHARED_KEYS = "its later layers may read the keys and values that an earlier one computed"
_NO_BLOCKS = (
    "it has one list per kind of module instead of a list of blocks, so there is no block to bypass"
)

REFUSED: dict[str, str] = {
    "albert": "it runs the same block at every depth, so the parameters of a dropped layer would "
    "still be trained by the other layers",
    "flaubert": _NO_BLOCKS,
    "funnel": "its blocks form stages, and the sequence is shortened between them",
    "gemma3n": _SHARED_KEYS,
    "gemma3n_text": _SHARED_KEYS,
    "gemma4": _SHARED_KEYS,
    "gemma4_text": _SHARED_KEYS,
    "ibert": "its blocks return a scaling factor with the hidden states, computed for their output",
    "lilt": "its blocks return two hidden states, of text and of layout",
    "reformer": "its blocks return two hidden states, since its residuals are reversible",
    "squeezebert": "its blocks take and return dictionaries",
    "xlm": _NO_BLOCKS,
    "xlnet": "its blocks return two hidden states, of content and of query",
    "zamba": "it runs one attention block at several depths",
    "zamba2": "it runs one attention block at several depths",
}
"""By ``config.model_type``, why layers cannot be dropped: results would be silently wrong."""

BLOCK_OUTPUTS: dict[str, str] = {
    block: architecture.output
    for architecture in ARCHITECTURES.values()
    for block in architecture.blocks
}
"""By class name of a block, a key of :data:`DROPPED_OUTPUTS`."""
