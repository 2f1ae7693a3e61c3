"""What a layer does in a step of this study, and the cost of a step by what its layers do.

Three modes are droppeft's (decision 0019). `MEAN` and `DETACHED` are of this study alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum, auto
from typing import Any

import torch
from torch import nn

from droppeft.costs.step_counts import StepCounts
from droppeft.layer_dropout.architectures import (
    BLOCK_OUTPUTS,
    DROPPED_OUTPUTS,
    hidden_of,
    with_hidden,
)
from droppeft.layer_dropout.module_attributes import attributes_set


class Mode(Enum):
    """What a layer does in a step."""

    TRAIN = auto()
    """It runs forward and backward."""
    FORWARD = auto()
    """It runs forward alone; no layer below it is trained."""
    CACHED = auto()
    """It does not run: its output is read from a store."""
    SKIP = auto()
    """It does not run: its output is its input."""
    MEAN = auto()
    """It does not run: its output is its input and the mean of what it adds."""
    DETACHED = auto()
    """It runs forward; in the backward pass the gradient passes by it unchanged."""


Modes = tuple[Mode, ...]

RUNS_FORWARD = frozenset((Mode.TRAIN, Mode.FORWARD, Mode.DETACHED))
IN_FULL_GRADIENT = frozenset((Mode.TRAIN, Mode.FORWARD, Mode.CACHED))
"""Modes with which the gradients of the trained layers are those of full depth."""


def relative_cost(counts: StepCounts, modes: Modes) -> float:
    """FLOPs of a step as a share of those of a step that trains all layers.

    Reading stored states, adding means, and the optimizer's step are not counted.
    """
    return _flops(counts, modes) / _flops(counts, (Mode.TRAIN,) * len(modes))


def _flops(counts: StepCounts, modes: Modes) -> int:
    return counts.rest.flops + sum(
        block.forward_flops * (mode in RUNS_FORWARD) + block.backward_flops * (mode is Mode.TRAIN)
        for block, mode in zip(counts.blocks, modes, strict=True)
    )


class Layers:
    """The modes of L layers inside :func:`with_modes`; at first all are trained."""

    def __init__(self, number: int) -> None:
        self.all_trained: Modes = (Mode.TRAIN,) * number
        self.modes = self.all_trained
        self.means: Sequence[torch.Tensor] = ()
        """By layer, the mean (H,) of what it adds to its input."""


@contextmanager
def with_modes(blocks: Sequence[nn.Module]) -> Iterator[Layers]:
    """Let the modes of the result decide what each block does in a forward inside.

    A block in one of the modes of `IN_FULL_GRADIENT` runs as it is: which gradients are used is the
    caller's affair.
    """
    layers = Layers(len(blocks))
    with ExitStack() as undo:
        for index, block in enumerate(blocks):
            undo.enter_context(attributes_set(block, forward=_forward(layers, index, block)))
        yield layers


def _forward(layers: Layers, index: int, block: nn.Module) -> Callable[..., Any]:
    plain = block.forward
    without = DROPPED_OUTPUTS[BLOCK_OUTPUTS[type(block).__name__]]

    def forward(*args: Any, **kwargs: Any) -> Any:
        mode, call = layers.modes[index], (args, kwargs)
        hidden = hidden_of(call)
        if mode is Mode.SKIP:
            return without(block, call)
        if mode is Mode.MEAN:
            added = layers.means[index].to(hidden.dtype)
            return without(block, with_hidden(call, hidden + added))
        output = plain(*args, **kwargs)
        if mode is not Mode.DETACHED:
            return output
        if not isinstance(output, tuple):
            return _PassedBy.apply(hidden, output.detach())
        return (_PassedBy.apply(hidden, output[0].detach()), *output[1:])

    return forward


class _PassedBy(torch.autograd.Function):
    """The layer's output in the forward pass, with the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@contextmanager
def observing(blocks: Sequence[nn.Module], mask: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Sum up, for each block, what it adds to the states of real tokens in the forwards inside.

    Args:
        mask: (B, S), 1 for real tokens.

    Yields:
        By block, the sum (H,) over tokens, in fp32, once it has run.
    """
    sums: list[torch.Tensor] = []
    real = mask.bool()

    def note(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        before = hidden_of((args, kwargs))
        sums.append((states.float() - before.float())[real].sum(0))

    with ExitStack() as undo:
        for block in blocks:
            handle = block.register_forward_hook(note, with_kwargs=True)
            undo.callback(handle.remove)
        yield sums
