"""What a forward pass stores for its backward pass, derived by hand and measured by torch."""

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import profile
from transformers.modeling_layers import GradientCheckpointingLayer

from adapter_contract import Attached, case, texts
from droppeft.costs.operation_counter import OperationCounter
from droppeft.layer_dropout import gated
from droppeft.layer_dropout.modes import Mode, skipping
from droppeft.tasks.classification import Classification
from droppeft.training.activation_memory import ActivationMeter
from droppeft.training.checkpointing import checkpointed
from droppeft.training.loop import Step, Trainable, train
from handmade import TRAINING

FLOAT = 4  # bytes


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def stored_by(model: nn.Module, *forwards: Callable[[], torch.Tensor]) -> int:
    meter = ActivationMeter(model)
    for forward in forwards:
        with meter.measuring():
            forward()
    return meter.peak_bytes


def test_the_meter_counts_what_backward_needs() -> None:
    """Of 5 rows: the input (4 wide), ReLU's output (8, saved by ReLU and by the second layer in
    one storage) and the squared output (3), 4 bytes each; no weight."""
    model, x = mlp(), torch.ones(5, 4)
    assert stored_by(model, lambda: model(x).square().sum()) == 5 * (4 + 8 + 3) * 4


def test_the_meter_does_not_count_what_needs_no_gradient() -> None:
    model, x = mlp(), torch.ones(5, 4)
    with torch.no_grad():
        assert stored_by(model, lambda: model(x).square().sum()) == 0
    # With the first layer frozen neither its input nor ReLU's mask is needed.
    model.get_submodule("0").requires_grad_(False)
    assert stored_by(model, lambda: model(x).square().sum()) == 5 * (8 + 3) * 4


def test_the_meter_counts_a_storage_once_and_whole() -> None:
    row = torch.ones(100, requires_grad=True).clone()
    part, other = row[:10], row[5:20]
    assert stored_by(nn.Identity(), lambda: part.square().sum() + other.square().sum()) == 400


def test_the_meter_reports_the_largest_forward() -> None:
    model = mlp()
    small, large = torch.ones(2, 4), torch.ones(6, 4)
    sizes = [lambda: model(large).square().sum(), lambda: model(small).square().sum()]
    assert stored_by(model, *sizes) == 6 * (4 + 8 + 3) * 4


def test_metering_changes_no_gradient() -> None:
    metered, plain, x = mlp(), mlp(), torch.ones(5, 4)
    with ActivationMeter(metered).measuring():
        loss = metered(x).square().sum()
    loss.backward()
    plain(x).square().sum().backward()
    pairs = zip(metered.parameters(), plain.parameters(), strict=True)
    assert all(
        one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
        for one, other in pairs
    )


# Under gradient checkpointing


class Block(GradientCheckpointingLayer):
    """A block of width 4 with a wider hidden layer."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, inner), nn.Linear(inner, 4)
        self.runs = 0

    def forward(self, hidden: torch.Tensor, shift: Any = None) -> torch.Tensor:
        self.runs += 1
        made: torch.Tensor = self.down(self.up(hidden).relu())
        return made if shift is None else made + shift[0]


class Stack(nn.Module):
    def __init__(self, *inner: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for width in inner)

    def forward(self, hidden: torch.Tensor, shift: Any = None) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden, shift=shift)
        return hidden.square().sum()


def peak_of(stack: Stack, *inputs: torch.Tensor, **named: Any) -> int:
    """The peak of training steps on each of the inputs."""
    meter = ActivationMeter(stack)
    with checkpointed(stack, list(stack.blocks), meter.note):
        for one in inputs:
            with meter.measuring():
                loss = stack(one, **named)
            loss.backward()
    return meter.peak_bytes


def test_a_checkpointed_forward_counts_what_it_stores_and_its_largest_block() -> None:
    """Stored for 5 rows: the inputs of three blocks and of the square, each of width 4. A block
    that runs again stores ReLU's output, and its input, which has been counted."""
    rows = torch.ones(5, 4)
    assert peak_of(Stack(8, 8, 8), rows) == 5 * (4 * 4 + 8) * FLOAT
    assert peak_of(Stack(8, 20, 8), rows) == 5 * (4 * 4 + 20) * FLOAT


def test_checkpointed_blocks_that_run_forward_only_are_not_counted() -> None:
    """Only the input of the last block is stored, beside that of the square."""
    stack = Stack(8, 8, 8)
    meter = ActivationMeter(stack)
    with checkpointed(stack, list(stack.blocks), meter.note), gated(stack.blocks) as gates:
        gates.modes = (Mode.FORWARD, Mode.FORWARD, Mode.TRAIN)
        with meter.measuring():
            loss = stack(torch.ones(5, 4))
        loss.backward()
    assert meter.peak_bytes == 5 * (2 * 4 + 8) * FLOAT
    assert [block.runs for block in stack.blocks] == [1, 1, 3]  # run, recomputed and measured


def test_all_arguments_of_a_block_are_counted() -> None:
    """Also tensors in a tuple, such as rotary positions, which all blocks share."""
    shift = torch.ones(5, 4), torch.ones(7)
    expected = 5 * (4 * 4 + 8) * FLOAT + (5 * 4 + 7) * FLOAT
    assert peak_of(Stack(8, 8, 8), torch.ones(5, 4), shift=shift) == expected


def test_blocks_are_run_again_only_for_a_new_maximum() -> None:
    def runs(*rows: int) -> list[int]:
        stack = Stack(8, 8, 20)
        peak_of(stack, *(torch.ones(number, 4) for number in rows))
        return [block.runs - 2 * len(rows) for block in stack.blocks]

    # Three kinds: with an input that needs no gradient, with one that does, and a wide one.
    assert runs(5) == [1, 1, 1]
    assert runs(5, 4, 5, 3) == [1, 1, 1]
    assert runs(3, 4, 4, 5) == [3, 3, 3]
    stack = Stack(8, 8, 20)
    assert peak_of(stack, *(torch.ones(number, 4) for number in (3, 6, 5))) == 6 * (16 + 20) * FLOAT


def test_only_the_last_block_of_a_kind_is_run_again() -> None:
    stack = Stack(8, 8, 8, 8)
    peak_of(stack, torch.ones(5, 4))
    assert [block.runs - 2 for block in stack.blocks] == [1, 0, 0, 1]


def test_the_largest_block_may_be_in_a_step_that_stores_less() -> None:
    """The first step stores more inputs, but the second has the largest block."""
    stack = Stack(8, 8, 8, 100)
    meter = ActivationMeter(stack)
    with checkpointed(stack, list(stack.blocks), meter.note):
        for rows, blocks in ((6, stack.blocks[:3]), (5, stack.blocks[3:])):
            hidden = torch.ones(rows, 4)
            with meter.measuring():
                for block in blocks:
                    hidden = block(hidden)
                loss = hidden.square().sum()
            loss.backward()
    assert meter.peak_bytes == 5 * (2 * 4 + 100) * FLOAT


def test_memory_for_measuring_a_block_is_released() -> None:
    """No backward pass frees the graph of such a block, so it must not reference itself."""
    on = Attached(case("lora", "bert"))
    meter, counter = ActivationMeter(on.model), OperationCounter(on.model)
    with checkpointed(on.model.train(), on.blocks, meter.note), counter:
        for _ in range(2):
            with meter.measuring():
                loss = TASK.loss(on.model, texts())
            loss.backward()
            del loss
            on.model.zero_grad()
            gc.collect()
    assert meter.peak_bytes > 5 * HIDDEN
    assert counter.alive_bytes < HIDDEN


def test_calls_of_a_failed_forward_are_discarded() -> None:
    stack = Stack(8)
    meter = ActivationMeter(stack)
    with checkpointed(stack, list(stack.blocks), meter.note):
        with pytest.raises(RuntimeError, match="shape"), meter.measuring():
            stack(torch.ones(50, 4)).backward(torch.ones(7))
        with meter.measuring():
            stack(torch.ones(5, 4))
    assert meter.peak_bytes == 5 * (2 * 4 + 8) * FLOAT


TASK = Classification(("input_ids",), 0, torch.device("cpu"))
EVERY = (True, True, True)


def peak(gates: Sequence[bool], checkpointing: bool, **settings: Any) -> int:
    """Of one step of LoRA on a tiny BERT, 8 rows of 7 tokens, 32 wide."""
    on = Attached(case("lora", "bert"))
    config = replace(TRAINING, checkpointing=checkpointing, **settings)
    trainable = Trainable(on.model, on.blocks, on.groups, TASK)
    return train(trainable, [Step([texts()], skipping(gates), 1.0)], config).activation_bytes_peak


HIDDEN = 8 * 7 * 32 * FLOAT
MASK = 8 * 1 * 7 * 7  # bytes of a boolean mask, stored so that a block can run again


def test_with_one_layer_checkpointing_saves_nothing() -> None:
    """The layer that runs again stores as much as without; each further layer adds one input."""
    one = (False, True, False)
    assert peak(one, True) == peak(one, False) + MASK
    assert peak((True, True, False), True) == peak(one, True) + HIDDEN
    assert peak(EVERY, True) == peak(one, True) + 2 * HIDDEN


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_under_autocast_blocks_are_run_again_as_the_backward_will(precision: str) -> None:
    """Without checkpointing copies in half precision are stored, not the input itself."""
    one, two = (False, True, False), (True, True, False)
    lean = [peak(gates, True, precision=precision) for gates in (one, two, EVERY)]
    assert lean[0] == peak(one, False, precision=precision) + HIDDEN + MASK
    assert lean[2] - lean[1] == HIDDEN


def live_bytes(on: Attached, batch: dict[str, torch.Tensor]) -> int:
    """The most that is allocated at any moment of a forward and a backward, by torch's profiler."""
    with profile(profile_memory=True) as seen:
        TASK.loss(on.model, batch).backward()
    on.model.zero_grad()
    events: Any = seen.profiler
    moments = sorted(
        (event.start_ns(), event.nbytes())
        for event in events.kineto_results.events()
        if event.name() == "[memory]"
    )
    live = most = 0
    for _, size in moments:
        live += size
        most = max(most, live)
    return most


def counted_and_seen(on: Attached, checkpointing: bool) -> tuple[int, int]:
    """What the meter counts of a step, and what the profiler sees of another."""
    batch = {name: column.repeat(16, *[8] * (column.dim() - 1)) for name, column in texts().items()}
    meter = ActivationMeter(on.model)
    with checkpointed(on.model, on.blocks, meter.note) if checkpointing else nullcontext():
        with meter.measuring():
            TASK.loss(on.model.train(), batch)
        return meter.peak_bytes, live_bytes(on, batch)


def test_torch_s_profiler_sees_the_same_saving() -> None:
    """The profiler also counts temporary tensors of the backward pass, the same in both cases."""
    on = Attached(case("lora", "bert"))
    counted, seen = counted_and_seen(on, checkpointing=False)
    lean_counted, lean_seen = counted_and_seen(on, checkpointing=True)
    assert lean_counted < 0.6 * counted
    assert seen - lean_seen == pytest.approx(counted - lean_counted, rel=0.03)
