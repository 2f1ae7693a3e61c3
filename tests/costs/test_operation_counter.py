"""FLOPs, stored bytes and allocated bytes against numbers derived by hand."""

import torch
from torch import nn

from droppeft.costs.operation_counter import OperationCounter, watched

FLOAT = 4


class Square(nn.Module):
    """A block: hidden states (B, S, H) times a matrix, squared."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.map(hidden_states) ** 2
        return out


def counted(blocks: list[Square], hidden: torch.Tensor, cut: int | None = None) -> OperationCounter:
    model = nn.ModuleList(blocks)
    counter = OperationCounter(model)
    with counter, watched(counter, dict(enumerate(blocks)), cut):
        with counter.storing():
            for block in blocks:
                hidden = block(hidden)
            loss = hidden.sum()
        counter.phase, counter.region = "backward", None
        loss.backward()
    return counter


def test_flops_are_counted_by_block_and_direction() -> None:
    """A product of (6, 8) and (8, 8) is 2·6·8·8; the backward has one for the weight and, where
    something below is trained, one for the input."""
    counter = counted([Square(8), Square(8)], torch.ones(2, 3, 8))
    product = 2 * 6 * 8 * 8
    assert counter.flops[0, "forward"] == counter.flops[1, "forward"] == product
    assert counter.flops[0, "backward"] == product
    assert counter.flops[1, "backward"] == 2 * product
    assert counter.flops_in("forward") == 2 * product
    assert counter.flops_in("backward") == 3 * product


def test_a_cut_lets_the_backward_reach_the_input_of_a_block() -> None:
    counter = counted([Square(8), Square(8)], torch.ones(2, 3, 8), cut=0)
    assert counter.flops[0, "backward"] == counter.flops[1, "backward"] == 2 * (2 * 6 * 8 * 8)


def test_a_block_stores_its_input_and_its_product() -> None:
    """Two tensors of 6·8 values: the inputs of the linear map and of the square."""
    counter = counted([Square(8), Square(8)], torch.ones(2, 3, 8))
    each = 2 * 6 * 8 * FLOAT
    assert [counter.stored_for(0), counter.stored_for(1)] == [each, each]
    assert counter.stored_bytes == 2 * each


def test_tensors_made_outside_of_blocks_are_not_counted_for_them() -> None:
    """Except for their input hidden states."""
    block, mask = Square(8), torch.ones(6, 8)
    counter = OperationCounter(block)
    with counter, watched(counter, {0: block}), counter.storing():
        block(torch.ones(1, 6, 8))
        counter.store(mask, 0)
        counter.store(mask, 1)
    assert counter.stored_for(0) == 2 * 6 * 8 * FLOAT
    assert counter.stored_bytes == 3 * 6 * 8 * FLOAT


def test_the_peak_is_of_what_is_alive_at_the_same_time() -> None:
    """Tensors of 1,000 values: a, b and their sum; then twice the sum, after a and b are freed."""
    counter = OperationCounter(nn.Identity())
    with counter:
        a, b = torch.ones(1000), torch.ones(1000)
        c = a + b
        assert counter.peak_bytes == 3 * 1000 * FLOAT
        del a, b
        d = c * 2
        c.add_(d)  # in place: nothing is allocated
        torch.ones(500)
        assert counter.peak_bytes == 3 * 1000 * FLOAT
        e, f = c + d, c - d
    assert counter.peak_bytes == 4 * 1000 * FLOAT
    assert len(e) == len(f)


def test_parameters_are_not_counted() -> None:
    model = nn.Linear(4, 4, bias=False)
    counter = OperationCounter(model)
    with counter, counter.storing():
        model(torch.ones(2, 4, requires_grad=True).clone())
    # Stored: the copy, which the weight's gradient needs. Allocated: leaf, copy and product.
    assert counter.stored_bytes == 2 * 4 * FLOAT
    assert counter.peak_bytes == 3 * 2 * 4 * FLOAT


def test_products_with_experts_count() -> None:
    """Seven tokens of width 8, each with one of three matrices (8, 4)."""
    tokens, experts = torch.ones(7, 8), torch.ones(3, 8, 4)
    ends = torch.tensor([2, 5, 7], dtype=torch.int32)
    counter = OperationCounter(nn.Identity())
    with counter:
        torch._grouped_mm(tokens, experts, offs=ends)
    assert counter.flops_in("forward") == 2 * 7 * 8 * 4
