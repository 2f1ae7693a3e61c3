"""Frozen weights in 8 or 4 bits, by bitsandbytes.

Source: 8 bits as in LLM.int8() (arXiv:2208.07339) with its threshold of 6 for outliers; 4 bits as
in QLoRA (arXiv:2305.14314), NF4 with double quantisation, which saves another 0.37 bit per weight
and costs no accuracy there. :func:`patch_quantised_layers` is ours.

Weights are always quantised on the CPU: other hardware rounds differently, and all clients of a run
must have the same weights. Heads are trained and stay in float32. So does everything that is not a
linear map: normalisations, and embeddings, which are most of a small encoder.

A 4-bit layer multiplies by its dequantised weight. An 8-bit layer does so when it is trained on a
CPU. Otherwise it also rounds its inputs to 8 bits, row by row, except for columns that have an
outlier anywhere in the batch. A row's output then depends slightly on the other rows of its batch.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from droppeft.errors import DroppeftError
from droppeft.extras import require, silence_bitsandbytes

QUANTIZATIONS = {"Int8Params": "8bit", "Params4bit": "4bit"}
"""The quantisation by the name of bitsandbytes' class of a weight."""


def check_installed(quantization: str) -> None:
    """Check that the package for a quantisation is installed.

    Raises:
        DroppeftError: bitsandbytes is missing.
    """
    if quantization != "none":
        require("quantization", f"quantization={quantization}")


KINDS: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        # As in the rest of the model; under autocast the product is in half precision.
        "bnb_4bit_compute_dtype": torch.float32,
    },
}
"""Arguments of transformers' ``BitsAndBytesConfig``, without the modules that it skips."""


def settings(quantization: str, heads: Collection[str]) -> dict[str, Any]:
    """Arguments of ``BitsAndBytesConfig``.

    Args:
        quantization: ``"8bit"`` or ``"4bit"``.
        heads: names of modules that are not quantised, nor any module inside.
    """
    # transformers matches from the beginning of a module's name; these may be any part of it.
    return {**KINDS[quantization], "llm_int8_skip_modules": [rf"(.*\.)?({'|'.join(heads)})"]}


def loading_options(quantization: str, heads: Collection[str]) -> dict[str, Any]:
    """Arguments of transformers' ``from_pretrained`` for a quantisation; none for ``"none"``."""
    if quantization == "none":
        return {}
    silence_bitsandbytes()
    config = BitsAndBytesConfig(**settings(quantization, heads))
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def quantised(
    model: Any, quantization: str, heads: Collection[str], dtype: torch.dtype = torch.float32
) -> Any:
    """A quantised copy of a model in memory, to be passed to :func:`patch_quantised_layers`.

    Args:
        quantization: ``"none"`` returns the model itself.
        heads: as in :func:`settings`.
        dtype: of the weights that are not quantised.
    """
    if quantization == "none":
        return model
    loaded = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=dtype,
        **loading_options(quantization, heads),
    )
    loaded.name_or_path = model.name_or_path
    return loaded


def check_not_prequantised(model: Any, path: str) -> None:
    """Refuse files with quantised weights, which would override the setting, heads included.

    Raises:
        DroppeftError: the message says what to do instead.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.pre_quantized:
        raise DroppeftError(
            f"model={path}: its files are quantised already; name the model that they were made "
            "from, and set quantization=8bit or quantization=4bit"
        )


def patch_quantised_layers(model: nn.Module) -> None:
    """Make quantised layers behave like frozen layers. Call it once, after loading.

    - On CPUs with AVX512-BF16, a 4-bit layer's first evaluation rewrites its weight for a kernel
      without backward. This is disabled.
    - An 8-bit layer stores its input for the gradient of its weight, which is never needed here,
      and hides it from autograd's hooks and from gradient checkpointing. The input is removed.
    - Under autocast an 8-bit layer rounds its bias permanently. The bias is restored.
    - Under autocast a quantised layer may output float32, which takes twice the memory. The output
      is cast to autocast's precision, as that of any linear map.
    """
    for module in _quantised_modules(model):
        if quantization_of(module) == "4bit":
            module.support_avx512bf16_for_cpu = False
        else:
            module.register_forward_pre_hook(_remember_bias)
            module.register_forward_hook(_drop_saved_input)
        module.register_forward_hook(_as_autocast)


def quantization_of(model: nn.Module) -> str:
    """``"8bit"`` or ``"4bit"`` if a model has weights quantised so, else ``"none"``."""
    weights = (value for value in model.parameters() if is_quantised(value))
    return next((QUANTIZATIONS[type(value).__name__] for value in weights), "none")


def is_quantised(weight: object) -> bool:
    """Whether a parameter contains the codes of a quantised weight."""
    return type(weight).__name__ in QUANTIZATIONS


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model in place, including tensors of 8-bit layers that ``nn.Module.to`` omits."""
    model.to(device)
    for module in _quantised_modules(model):
        if quantization_of(module) == "8bit":
            for holder in (module.weight, module.state):
                holder.CB = None if holder.CB is None else module.weight.data
                holder.SCB = None if holder.SCB is None else holder.SCB.to(device)
    return model


def copy_dequantised_values(source: nn.Module, target: Any) -> None:
    """Copy the dequantised weights of a quantised model to the same model without quantisation.

    Args:
        source: the quantised model, without an adapter.
        target: the same model, loaded without quantisation; changed in place.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes

    with torch.no_grad():
        for name, module in source.named_modules():
            if _has_codes(module):
                linear = target.get_submodule(name)
                value = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
                linear.weight.copy_(value.T if isinstance(linear, Conv1D) else value)


def _quantised_modules(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if _has_codes(module))


def _has_codes(module: nn.Module) -> bool:
    # Not module.weight: in peft's layers it is the weight of the layer that they wrap.
    return is_quantised(module._parameters.get("weight"))


def _remember_bias(module: Any, inputs: object) -> None:
    if module.bias is not None:
        vars(module)["saved_bias"] = module.bias.data


def _drop_saved_input(module: Any, inputs: object, output: torch.Tensor) -> None:
    if module.bias is not None:
        module.bias.data = vars(module).pop("saved_bias")
    if output.grad_fn is not None:
        node: Any = output.grad_fn
        # Where MatMul8bitFp and MatMul8bitLt store what the weight's gradient needs.
        node.A, node.tensors = None, (None, None, None)


def _as_autocast(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    device_type = output.device.type
    if not torch.is_autocast_enabled(device_type):
        return output
    return output.to(torch.get_autocast_dtype(device_type))
