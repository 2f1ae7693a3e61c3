"""The products that the study of speed records are all that a training step has."""

import torch
from torch.nn import functional

from benchmarks.speed.products import Recording


def test_products_and_attention_are_recorded_forward_and_backward() -> None:
    rows, inner, outer = 6, 4, 8
    x = torch.randn(2, 3, inner, requires_grad=True)
    weight = torch.randn(outer, inner, requires_grad=True)
    with Recording() as recording:
        heads = functional.linear(x, weight).view(2, 3, 2, 4).transpose(1, 2)
        functional.scaled_dot_product_attention(heads, heads, heads).sum().backward()
    names = [call[0].overloadpacket.__name__ for call in recording.calls]
    attention = [name for name in names if "scaled_dot_product" in name]
    assert len(attention) == 2
    assert len(names) == 2 + 3  # the product, and its gradients for input and weight
    assert recording.flops() == 3 * 2 * rows * inner * outer


def test_a_replay_computes_as_often_as_it_is_called() -> None:
    with Recording() as recording:
        torch.ones(2, 3) @ torch.ones(3, 4)
    replay = recording.replay()
    with Recording() as again:
        replay()
        replay()
    assert [call[0].overloadpacket.__name__ for call in again.calls] == ["mm", "mm"]
    assert again.flops() == 2 * recording.flops()
