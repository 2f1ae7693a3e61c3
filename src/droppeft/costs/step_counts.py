"""Arithmetic and bytes of one training step, by block: plain numbers that add up.

Ours. :mod:`droppeft.costs.fake_step` counts them for a model; :mod:`droppeft.costs.modelled_clock`
turns them into the seconds of a client.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCounts:
    """What one part of a model costs in one training step.

    Attributes:
        forward_flops: of its forward; a multiplication with an addition counts as two.
        backward_flops: of its backward, with the forward that checkpointing repeats.
        stored_bytes: what its forward keeps for the backward, each storage counted once.
        weight_bytes: all its parameters and buffers, in the precision in which they are kept.
        parameters: how many, trainable ones included.
        trainable_parameters: how many of them the adapter (or the head) trains.
    """

    forward_flops: int
    backward_flops: int
    stored_bytes: int
    weight_bytes: int
    parameters: int
    trainable_parameters: int

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class StepCounts:
    """What one training step of a model costs, at one batch and length.

    Attributes:
        batch: B, rows of a step.
        length: S, tokens of a row, padding included.
        blocks: the L layers, as if each ran; a dropped one costs nothing.
        rest: embeddings, head and loss, which run in every step.
        passing_bytes: of the largest tensors that live for a moment only, beside what is stored.
    """

    batch: int
    length: int
    blocks: tuple[BlockCounts, ...]
    rest: BlockCounts
    passing_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens of a step, padding included: batch times length."""
        return self.batch * self.length


def step_flops(counts: StepCounts, active: Sequence[bool]) -> int:
    """FLOPs of a step that runs the blocks where ``active`` (L) is true."""
    return counts.rest.flops + sum(block.flops for block in running(counts, active))


def step_stored_bytes(counts: StepCounts, active: Sequence[bool]) -> int:
    """Bytes that such a step stores for its backward."""
    return counts.rest.stored_bytes + sum(block.stored_bytes for block in running(counts, active))


def running(counts: StepCounts, active: Sequence[bool]) -> list[BlockCounts]:
    """The blocks where ``active`` (L) is true."""
    return [block for block, runs in zip(counts.blocks, active, strict=True) if runs]
