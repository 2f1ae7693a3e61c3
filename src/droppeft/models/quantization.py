"""Frozen weights in 8 or 4 bits, kept by bitsandbytes.

Source: 8 bits as in LLM.int8() (arXiv:2208.07339) with its threshold of 6 for outliers; 4 bits as
in QLoRA (arXiv:2305.14314), NF4 with double quantisation, which saves another 0.37 bit per weight
and costs no accuracy there. Making both behave as frozen weights (see :func:`settle`) is ours.

Weights are quantised on the CPU, wherever they are used: other hardware rounds otherwise, and every
device of a run must have the same. Heads are trained and stay in float32. So does all that is no
linear map: embeddings, of which a small encoder has more than of anything else, and normalisations.

A 4-bit layer multiplies by the values that its codes stand for. An 8-bit layer does so when it is
trained on a CPU; otherwise it rounds its inputs to 8 bits as well, row by row, but for the columns
that have an outlier anywhere in the batch: then answers depend, a little, on what else is in it.
"""

import importlib.util
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from droppeft.errors import DroppeftError

QUANTIZATIONS = {"Int8Params": "8bit", "Params4bit": "4bit"}
"""bitsandbytes' class of a weight, and what we call it."""

_NOISE = (
    "bitsandbytes.backends.cpu.ops",  # of a kernel for inference that is not used here
    "bitsandbytes.autograd._functions",  # in each forward, that 8-bit products begin in float16
)


def hush() -> None:
    """Silence what bitsandbytes says of its normal work, when imported (as peft does) and after."""
    for name in _NOISE:
        logging.getLogger(name).setLevel(logging.ERROR)


def check_installed(quantization: str) -> None:
    """Say what is missing for a quantisation.

    Raises:
        DroppeftError: there is no bitsandbytes.
    """
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise DroppeftError(
            f"quantization={quantization} needs bitsandbytes; run: "
            "pip install 'droppeft[quantization]'"
        )


KINDS: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        # As the rest of the model; under autocast the product is one in half precision, as theirs.
        "bnb_4bit_compute_dtype": torch.float32,
    },
}
"""Settings of transformers' ``BitsAndBytesConfig``, besides what is not quantised."""


def settings(quantization: str, heads: Collection[str]) -> dict[str, Any]:
    """What ``BitsAndBytesConfig`` is made of.

    Args:
        quantization: ``"8bit"`` or ``"4bit"``.
        heads: names of modules that stay as they are, with all inside.
    """
    # transformers matches names of modules from their beginning, and these are anywhere in them.
    return {**KINDS[quantization], "llm_int8_skip_modules": [rf"(.*\.)?({'|'.join(heads)})"]}


def loading_options(quantization: str, heads: Collection[str]) -> dict[str, Any]:
    """Arguments of transformers' ``from_pretrained`` that quantise what it loads, if at all."""
    if quantization == "none":
        return {}
    hush()
    config = BitsAndBytesConfig(**settings(quantization, heads))
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def quantised(model: Any, quantization: str, heads: Collection[str]) -> Any:
    """The same values, quantised in memory, in a new model; still to be settled."""
    if quantization == "none":
        return model
    loaded = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=torch.float32,
        **loading_options(quantization, heads),
    )
    loaded.name_or_path = model.name_or_path
    return loaded


def check_quantised_here(model: Any, path: str) -> None:
    """Refuse files that were quantised before: they overrule the setting, heads included.

    Raises:
        DroppeftError: with what to do instead.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.pre_quantized:
        raise DroppeftError(
            f"model={path}: its files are quantised already; name the model that they were made "
            "of, and choose by quantization=8bit or quantization=4bit"
        )


def settle(model: nn.Module) -> None:
    """Make quantised layers behave as frozen ones; once, after loading.

    - On CPUs with AVX512-BF16 a 4-bit layer's first evaluation rewrites its weight for a kernel
      that has no backward: it is told not to.
    - An 8-bit layer keeps its input for the gradient of its weight, out of sight of autograd's
      hooks and of gradient checkpointing: it is taken from it, for that gradient is never asked.
    - Under autocast an 8-bit layer rounds its bias for good: it is put back.
    - Under autocast a quantised layer may answer in float32, of which twice as much is stored: it
      answers in autocast's precision, as any linear map does.
    """
    for module in _quantised_modules(model):
        if quantization_of(module) == "4bit":
            module.support_avx512bf16_for_cpu = False
        else:
            module.register_forward_pre_hook(_remember_bias)
            module.register_forward_hook(_let_go)
        module.register_forward_hook(_as_autocast)


def quantization_of(model: nn.Module) -> str:
    """``"8bit"`` or ``"4bit"`` if any weight of a model is, else ``"none"``."""
    found = (value for value in model.parameters() if is_quantised(value))
    return next((QUANTIZATIONS[type(value).__name__] for value in found), "none")


def is_quantised(weight: object) -> bool:
    """Tell whether a parameter holds codes, not numbers."""
    return type(weight).__name__ in QUANTIZATIONS


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model, in place; nn.Module.to leaves behind what 8-bit layers keep beside weights."""
    model.to(device)
    for module in _quantised_modules(model):
        if quantization_of(module) == "8bit":
            for holder in (module.weight, module.state):
                holder.CB = None if holder.CB is None else module.weight.data
                holder.SCB = None if holder.SCB is None else holder.SCB.to(device)
    return model


def put_values(small: nn.Module, plain: Any) -> None:
    """Give a plain model, in place, the values that its quantised copy computes with.

    Args:
        small: quantised, without an adapter.
        plain: the same model, loaded without quantisation.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports the library

    with torch.no_grad():
        for name, module in small.named_modules():
            if _has_codes(module):
                target = plain.get_submodule(name)
                value = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
                target.weight.copy_(value.T if isinstance(target, Conv1D) else value)


def _quantised_modules(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if _has_codes(module))


def _has_codes(module: nn.Module) -> bool:
    # Not module.weight: peft's layers answer with that of the layer that they wrap.
    return is_quantised(module._parameters.get("weight"))


def _remember_bias(module: Any, inputs: object) -> None:
    if module.bias is not None:
        vars(module)["kept_bias"] = module.bias.data


def _let_go(module: Any, inputs: object, output: torch.Tensor) -> None:
    if module.bias is not None:
        module.bias.data = vars(module).pop("kept_bias")
    if output.grad_fn is not None:
        node: Any = output.grad_fn
        # What MatMul8bitFp and MatMul8bitLt keep for the weight's gradient, each by its names.
        node.A, node.tensors = None, (None, None, None)


def _as_autocast(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    kind = output.device.type
    if not torch.is_autocast_enabled(kind):
        return output
    return output.to(torch.get_autocast_dtype(kind))
