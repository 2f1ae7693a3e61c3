"""Attention in bf16 on processors, with a backward pass that is as fast as its forward pass.

torch's fused attention computes gradients of bf16 tensors on a CPU three to ten times as slowly as
the products that they consist of. Here short sequences are trained without it. Ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LONGEST = 256
"""Longest sequence that is trained so. Of longer ones the probabilities, which are stored for the
backward pass, take more memory than the rest of a layer, and torch's own way gets faster."""


@contextmanager
def fast_half_attention(precision: str, device: torch.device) -> Iterator[None]:
    """Let transformers' models train their attention so inside, in bf16 on a CPU."""
    name = "sdpa"
    if (
        precision != "bf16"
        or device.type != "cpu"
        or name in ALL_ATTENTION_FUNCTIONS._local_mapping
    ):
        yield
        return
    ALL_ATTENTION_FUNCTIONS[name] = _attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers' function of the same parameters does.

    Args:
        query, key, value: (B, heads, S, D); those of keys may be fewer.
        attention_mask: (B or 1, heads or 1, S, keys), boolean or additive.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length = query.shape[2]
    usual = (
        query.dtype == key.dtype == value.dtype == torch.bfloat16
        and dropout == 0.0
        and length == key.shape[2] <= LONGEST
        and query.requires_grad
        and not (attention_mask is not None and attention_mask.requires_grad)
        and all(other is None or other is False for other in map(others.get, _SPECIAL))
    )
    if not usual:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return output
    groups = query.shape[1] // key.shape[1]
    mask = attention_mask
    if mask is None and is_causal and length > 1:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads: torch.Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query, repeat_kv(key, groups), repeat_kv(value, groups), mask, scale
    )
    return heads.transpose(1, 2).contiguous(), None


_SPECIAL = ("position_bias", "cache", "softcap", "output_attentions", "s_aux")
"""Arguments with which the attention is another one."""


class _Attention(torch.autograd.Function):
    """softmax(scale · q kᵀ + mask) v. The probabilities are stored, in bf16."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        scores = torch.matmul(query, key.transpose(-1, -2)).float().mul_(scale)
        if mask is not None and mask.dtype == torch.bool:
            # Not minus infinity: a row may be masked as a whole.
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores.add_(mask)
        probabilities = functional.softmax(scores, -1).to(query.dtype)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.scale = scale
        return torch.matmul(probabilities, value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, probabilities = ctx.saved_tensors
        wanted, of_query, of_key, of_value = ctx.needs_input_grad, None, None, None
        if wanted[2]:
            of_value = torch.matmul(probabilities.transpose(-1, -2), gradient)
        of_probabilities = torch.matmul(gradient, value.transpose(-1, -2))
        of_scores = torch._softmax_backward_data(
            of_probabilities, probabilities, -1, probabilities.dtype
        )
        if wanted[0]:
            of_query = torch.matmul(of_scores, key).mul_(ctx.scale)
        if wanted[1]:
            of_key = torch.matmul(of_scores.transpose(-1, -2), query).mul_(ctx.scale)
        return of_query, of_key, of_value, None, None
