"""Fast products in bf16 on CPUs that have no instructions for bf16. Ours.

Without such instructions torch multiplies bf16 matrices one number at a time: a training step of
SmolLM2 takes about twenty times as long as in fp32. Here, the products are computed in fp32 from
copies that exist for a moment, and rounded to bf16. Weights and activations stay bf16.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

VALUES_AT_ONCE = 2**21
"""Largest number of values of a weight that are copied at a time: 8 MB in fp32. All but the head of
a small model is less."""


def use_fp32_products(model: nn.Module) -> None:
    """Let the linear maps of a model compute in fp32 on the CPU where they would in bf16.

    Args:
        model: changed in place: its linear maps become :class:`Fp32ProductLinear`.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Fp32ProductLinear


class Fp32ProductLinear(nn.Linear):
    """A linear map that multiplies in fp32 on the CPU where ``nn.Linear`` would in bf16.

    Its output is bf16, as that of ``nn.Linear``.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        weight, half = self.weight, torch.bfloat16
        casting = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == half
        if input.device.type != "cpu" or not (casting or input.dtype == weight.dtype == half):
            return super().forward(input)
        if weight.dtype != half or (weight.requires_grad and torch.is_grad_enabled()):
            bias = None if self.bias is None else self.bias.float()
            with torch.autocast("cpu", enabled=False):
                return functional.linear(input.float(), weight.float(), bias).to(half)
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input.to(half), weight
        )
        return product if self.bias is None else product + self.bias.to(half)


class _Product(torch.autograd.Function):
    """``input @ weight.T``, with a gradient for the input alone."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        product = input.new_empty(*input.shape[:-1], len(weight))
        with torch.autocast("cpu", enabled=False):
            copy = input.float()
            for rows in _parts(weight):
                product[..., rows] = functional.linear(copy, weight[rows].float())
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        of_input = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1], dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for rows in _parts(weight):
                of_input += gradient[..., rows].float() @ weight[rows].float()
        return of_input.to(gradient.dtype), None


def _parts(weight: torch.Tensor) -> list[slice]:
    """Return parts of the rows of a weight (out, in)."""
    rows = max(1, VALUES_AT_ONCE // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]
