"""Linear maps that allocate and store the same bytes as bitsandbytes' quantised ones.

Ours. They replace bitsandbytes' kernels, which do not run on fake tensors. Forward and backward
each dequantise the weight and free the values; only the codes stay in memory.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

BLOCK, SCALES_PER_BLOCK = 64, 256
"""Block sizes of NF4: weights that share a scale, and (8-bit) scales that share a second scale."""

TABLES_BYTES = 16 * 4 + 256 * 4 + 4
"""Of each 4-bit weight: the tables of values of its codes and of its scales' codes, and the scales'
offset."""


def quantized_bytes(shape: torch.Size, quantization: str) -> int:
    """Bytes of a quantised weight (out, in) with its scales, as bitsandbytes stores it."""
    count = shape.numel()
    if quantization == "8bit":
        return count + 4 * shape[0]
    scales = math.ceil(count / BLOCK)
    return math.ceil(count / 2) + scales + 4 * math.ceil(scales / SCALES_PER_BLOCK) + TABLES_BYTES


class QuantizedStub(nn.Linear):
    """A frozen linear map that is counted as if its weight were quantised.

    Attributes:
        quantization: ``"8bit"`` or ``"4bit"``.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, quantization: str) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.quantization = quantization

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias
        )
        return product


def replace_linear_maps(model: nn.Module, quantization: str, heads: Sequence[str]) -> None:
    """Replace in place the linear maps that would be quantised, in a model on the meta device.

    Args:
        model: changed in place.
        quantization: ``"none"``, ``"8bit"`` or ``"4bit"``.
        heads: names of modules that are not quantised.
    """
    if quantization == "none":
        return
    # As in droppeft.models.quantization: a part of the name begins with one of these.
    head = re.compile(rf"(.*\.)?({'|'.join(heads)})")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and not head.match(name):
            outputs, inputs = module.weight.shape
            if isinstance(module, Conv1D):
                inputs, outputs = outputs, inputs
            with torch.device("meta"):
                stub = QuantizedStub(inputs, outputs, module.bias is not None, quantization)
            model.set_submodule(name, stub)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight  # not counted as stored: the codes belong to the model
        return functional.linear(input, weight.to(input.dtype, copy=True), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ ctx.weight.to(gradient.dtype, copy=True), None, None
