"""Attention in bf16 on CPUs computes what torch's own does, with its gradients."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from droppeft.models.half_attention import LONGEST, fast_half_attention

CPU = torch.device("cpu")


def inputs(length: int, key_heads: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, length, 8) for heads in (4, key_heads, key_heads)]


def outcome(values: list[torch.Tensor], dtype: torch.dtype, **call: Any) -> list[torch.Tensor]:
    """Output and gradients of the attention that transformers' models use."""
    leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
    module = nn.Module()
    module.num_key_value_groups = 4 // values[1].shape[1]  # type: ignore[assignment]
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *leaves, **call)
    output.float().square().sum().backward()
    return [output, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def masks(length: int) -> dict[str, Any]:
    padded = torch.ones(2, 1, length, length, dtype=torch.bool)
    padded[1, ..., length // 2 :] = False
    additive = torch.zeros(2, 1, length, length).masked_fill(~padded, torch.finfo(torch.float).min)
    return {"none": None, "boolean": padded, "additive": additive}


@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_values_and_gradients_are_as_close_to_fp32_as_those_of_torch(
    mask: str, causal: bool, key_heads: int
) -> None:
    values, call = inputs(12, key_heads), {"attention_mask": masks(12)[mask], "is_causal": causal}
    exact = outcome(values, torch.float32, **call)
    if call["attention_mask"] is not None and mask == "additive":
        call["attention_mask"] = call["attention_mask"].bfloat16()
    theirs = outcome(values, torch.bfloat16, **call)
    with fast_half_attention("bf16", CPU):
        ours = outcome(values, torch.bfloat16, **call)
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        assert one.shape == other.shape
        error, usual = ((each.float() - right).norm() for each in (one, other))
        assert error < 1.5 * usual + 1e-3 * right.norm()


@pytest.mark.parametrize("usual", [{}, {"dropout": 0.5}])
def test_what_is_not_trained_in_bf16_is_left_to_torch(usual: dict[str, Any]) -> None:
    length = 12 if usual else LONGEST + 1
    values = inputs(length)
    with fast_half_attention("bf16", CPU):
        torch.manual_seed(1)
        ours = outcome(values, torch.bfloat16, attention_mask=None, **usual)
    torch.manual_seed(1)
    theirs = outcome(values, torch.bfloat16, attention_mask=None, **usual)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_outside_and_in_fp32_nothing_is_replaced() -> None:
    with fast_half_attention("fp32", CPU):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    with fast_half_attention("bf16", CPU):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
