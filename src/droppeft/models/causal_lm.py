"""Load causal language models, which generate text token by token; ours."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import ARCHITECTURES
from droppeft.models.architectures import architecture
from droppeft.models.loading import Backbone
from droppeft.models.precision import hold_in
from droppeft.models.quantization import check_installed, quantised
from droppeft.models.quiet import quiet
from droppeft.models.sources import ModelSource, find_source

HEADS = ("lm_head", "embed_out", "output_projection")
"""Names of the linear map from hidden states to the vocabulary, in transformers' models."""


def load_causal_lm(
    name: str,
    seed: int = 0,
    quantization: str = "none",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """Load a causal language model with its tokenizer and, if it has one, its chat template.

    The padding token may be the end-of-text token: what is learnt follows from the labels, never
    from the padding.

    Args:
        name: ``smollm2``, a hub id, a local folder, a GGUF file, or ``config:ARCHITECTURE``.
        seed: for an architecture's initial values.
        quantization: ``"8bit"`` or ``"4bit"`` for all linear maps but the head, which may share its
            weight with the embeddings. The model stays on the CPU until
            :func:`~droppeft.models.quantization.on_device` moves it.
        dtype: in which weights that are not quantised are held. ``weights_hash`` does not depend
            on it. peft keeps adapters in float32.

    Raises:
        DroppeftError: the model is unknown, unreadable, unsupported or not a causal language model,
            or a package is missing.
    """
    check_installed(quantization)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.startswith("config:"):
            source = ModelSource(name)
            model, tokenizer = _from_architecture(name, quantization)
        else:
            source = find_source(name)
            check_causal(name, source.load(AutoConfig.from_pretrained))
            # Codes follow from fp32 values, and files in another type from its rounding.
            exact = quantization == "none" and source.is_stored_in(dtype)
            loaded = dtype if exact else torch.float32
            model, report = source.load_model(AutoModelForCausalLM, quantization, HEADS, loaded)
            _check_complete(name, report)
            tokenizer = source.load_tokenizer()
    backbone = Backbone.of(model, tokenizer, source)
    hold_in(model, dtype)
    return backbone


def load_causal_lm_config(name: str) -> Any:
    """Load transformers' configuration of a causal language model, without weights or tokenizer.

    Args:
        name: as in :func:`load_causal_lm`.

    Raises:
        DroppeftError: as :func:`load_causal_lm`, as far as the configuration tells.
    """
    if name.startswith("config:"):
        config = AutoConfig.for_model(**architecture(name.removeprefix("config:")))
    else:
        with quiet():
            config = find_source(name).load(AutoConfig.from_pretrained)
    check_causal(name, config)
    return config


def check_causal(name: str, config: Any) -> None:
    """Check that a configuration is that of a causal language model.

    Args:
        name: the setting ``model``, for the message.
        config: transformers' configuration.

    Raises:
        DroppeftError: it is a sequence-to-sequence model, an encoder, or has no head for text.
    """
    kind = config.model_type
    known = ARCHITECTURES.get(kind)
    if getattr(config, "is_encoder_decoder", False):
        what = f"{kind} is a sequence-to-sequence model"
    elif known is not None and any(path.startswith("encoder.") for path in known.stacks):
        what = f"{kind} is an encoder, which does not generate text"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = f"transformers has no {kind} model that generates text"
    else:
        return
    raise DroppeftError(
        f"model={name}: {what}; name a causal language model, such as smollm2, or a folder or hub "
        "id of a Llama, Mistral, Gemma or Qwen model"
    )


def _from_architecture(name: str, quantization: str) -> tuple[nn.Module, Any]:
    config = load_causal_lm_config(name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = find_source("builtin").load_tokenizer()
    tokenizer.eos_token = tokenizer.sep_token
    return quantised(model, quantization, HEADS), tokenizer


def _check_complete(name: str, report: dict[str, Any]) -> None:
    """Refuse weights that are missing, for which transformers takes random ones."""
    missing = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if missing:
        raise DroppeftError(f"model={name}: its files have no fitting weights for {missing[0]}")
