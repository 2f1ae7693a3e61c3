"""Linear maps that store and allocate what bitsandbytes' quantised ones do, for counting.

Ours. bitsandbytes' own kernels know nothing of tensors without values. Their forward and backward
each make the weight's values anew and drop them; nothing is stored but the codes.
"""

import math
import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from droppeft.models.loading import HEAD_MODULES

BLOCK, SCALES_PER_BLOCK = 64, 256
"""Of NF4: weights with one scale, and scales (in 8 bits) with one scale of their own."""

TABLES_BYTES = 16 * 4 + 256 * 4 + 4
"""Per 4-bit weight: the values of its codes and of its scales' codes, and the scales' offset."""


def kept_bytes(shape: torch.Size, quantization: str) -> int:
    """Bytes of a quantised weight (out, in) with its scales, as bitsandbytes keeps it."""
    count = shape.numel()
    if quantization == "8bit":
        return count + 4 * shape[0]
    scales = math.ceil(count / BLOCK)
    return math.ceil(count / 2) + scales + 4 * math.ceil(scales / SCALES_PER_BLOCK) + TABLES_BYTES


class QuantizedStub(nn.Linear):
    """A frozen linear map whose weight is kept in few bits.

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


def with_stand_ins(model: nn.Module, quantization: str) -> None:
    """Replace, in place, what a quantisation would in a model on the meta device."""
    if quantization == "none":
        return
    # As in droppeft.models.quantization: from the beginning of any part of the name.
    head = re.compile(rf"(.*\.)?({'|'.join(HEAD_MODULES)})")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and not head.match(name):
            outputs, inputs = module.weight.shape
            if isinstance(module, Conv1D):
                inputs, outputs = outputs, inputs
            with torch.device("meta"):
                small = QuantizedStub(inputs, outputs, module.bias is not None, quantization)
            model.set_submodule(name, small)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight  # not saved: the codes belong to the model
        return functional.linear(input, weight.to(input.dtype, copy=True), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ ctx.weight.to(gradient.dtype, copy=True), None, None
