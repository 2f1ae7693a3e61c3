"""Where an architecture's blocks are, and what a dropped block must still answer.

Source: transformers' model code, version 5.23; what each entry promises is checked against models
built without the dropped blocks, with the result in ``docs/architectures.md``.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and named arguments of a block's forward."""


def hidden_of(call: Arguments) -> torch.Tensor:
    """The hidden states (B, S, H) that a block was called with: its first argument, always."""
    args, kwargs = call
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_hidden(call: Arguments, hidden: torch.Tensor) -> Arguments:
    """The same call with other hidden states."""
    args, kwargs = call
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def cache_of(call: Arguments) -> Any:
    """The key-value cache that a block was called with, by whatever name; ``None`` without one."""
    args, kwargs = call
    return next((one for one in (*kwargs.values(), *args) if hasattr(one, "get_seq_length")), None)


def _tensor(block: nn.Module, call: Arguments) -> torch.Tensor:
    return hidden_of(call)


def _tuple(block: nn.Module, call: Arguments) -> tuple[Any, ...]:
    return hidden_of(call), None


def _position_bias(block: nn.Module, call: Arguments) -> tuple[Any, ...]:
    """T5: the first block of a stack computes the biases that all later ones read.

    The bias of cross-attention is left out: it is zero, and a block that is not given it makes it.
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


ANSWERS: dict[str, Callable[[nn.Module, Arguments], Any]] = {
    "tensor": _tensor,
    "tuple": _tuple,
    "position bias": _position_bias,
}
"""What a dropped block returns, from itself and the arguments of its forward.

``tensor``: the hidden states it got; ``tuple``: those and ``None`` for attention weights;
``position bias``: those and the biases that later blocks need.
"""


class Architecture(NamedTuple):
    """How to gate one ``config.model_type``.

    Attributes:
        stacks: for each list of blocks, in the order of execution, its dotted name (its end, below
            the base model) and the entry of the configuration that says how long it is.
        blocks: class names of the blocks.
        answer: a key of :data:`ANSWERS`.
    """

    stacks: Mapping[str, str]
    blocks: tuple[str, ...]
    answer: str = "tensor"


def _encoder(block: str, answer: str = "tensor") -> Architecture:
    return Architecture({"encoder.layer": "num_hidden_layers"}, (block,), answer)


def _layers(block: str) -> Architecture:
    return Architecture({"layers": "num_hidden_layers"}, (block,))


def _h(block: str, answer: str = "tensor") -> Architecture:
    return Architecture({"h": "num_hidden_layers"}, (block,), answer)


def _two(block: str) -> Architecture:
    stacks = {"encoder.layers": "encoder_layers", "decoder.layers": "decoder_layers"}
    return Architecture(stacks, (f"{block}EncoderLayer", f"{block}DecoderLayer"))


def _t5(block: str, answer: str) -> Architecture:
    stacks = {"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"}
    return Architecture(stacks, (block,), answer)


ARCHITECTURES: dict[str, Architecture] = {
    # Encoders
    "bert": _encoder("BertLayer"),
    "big_bird": _encoder("BigBirdLayer"),
    "camembert": _encoder("CamembertLayer"),
    "convbert": _encoder("ConvBertLayer"),
    "data2vec-text": _encoder("Data2VecTextLayer"),
    "deberta": _encoder("DebertaLayer", "tuple"),
    # Also DeBERTa-v3. The optional convolution after block 0 belongs to the encoder, not to the
    # block: when block 0 is dropped it still runs, on block 0's input.
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
    # The whole model has a vision tower too, which is left at full depth.
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
    "bart": _two("Bart"),
    "blenderbot": _two("Blenderbot"),
    "blenderbot-small": _two("BlenderbotSmall"),
    "m2m_100": _two("M2M100"),
    "marian": _two("Marian"),
    "mbart": _two("MBart"),
    "mt5": _t5("MT5Block", "position bias"),
    "pegasus": _two("Pegasus"),
    "plbart": _two("PLBart"),
    "t5": _t5("T5Block", "position bias"),
    "umt5": _t5("UMT5Block", "tensor"),
    # Vision
    "deit": _layers("DeiTLayer"),
    "dinov2": _encoder("Dinov2Layer"),
    "vit": _layers("ViTLayer"),
    "vit_msn": _layers("ViTMSNLayer"),
}
"""By ``config.model_type``. A new one is a line here and a case in the contract of the tests."""

_SHARED_KEYS = "its later layers may read the keys and values that an earlier one computed"
_NO_BLOCKS = "its layers lie in one list per kind of module: there is no block to bypass"

REFUSED: dict[str, str] = {
    "albert": "it runs one block at every depth: the parameters of a dropped one would be trained "
    "all the same by the others",
    "flaubert": _NO_BLOCKS,
    "funnel": "its blocks come in stages between which the sequence is shortened",
    "gemma3n": _SHARED_KEYS,
    "gemma3n_text": _SHARED_KEYS,
    "gemma4": _SHARED_KEYS,
    "gemma4_text": _SHARED_KEYS,
    "ibert": "its blocks hand on a scaling factor beside the hidden states, made for their output",
    "lilt": "its blocks hand on two hidden states, of text and of layout",
    "reformer": "its blocks hand on two hidden states: its residuals are reversible",
    "squeezebert": "its blocks take and return dictionaries",
    "xlm": _NO_BLOCKS,
    "xlnet": "its blocks hand on two hidden states, of content and of query",
    "zamba": "it runs one attention block at several depths",
    "zamba2": "it runs one attention block at several depths",
}
"""By ``config.model_type``, why layers cannot be dropped (yet): a wrong answer would be silent."""

BLOCK_ANSWERS: dict[str, str] = {
    block: architecture.answer
    for architecture in ARCHITECTURES.values()
    for block in architecture.blocks
}
"""Class name of a block to a key of :data:`ANSWERS`."""
