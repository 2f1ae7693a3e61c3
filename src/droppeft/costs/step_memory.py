"""Bytes that a training process takes at its worst moment, part by part.

Ours. What is stored and what passes is counted (:mod:`droppeft.costs.fake_step`); the rest is sums:
trained values are in fp32, with a gradient each and AdamW's two moments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.errors import DroppeftError

VALUE_BYTES = 4
"""Of a trained value in fp32."""

PROCESS_BYTES = 500_000_000
"""Of a process that has loaded Python, torch, transformers and peft and taken a first small turn:
its own memory and the code that it has read. ``droppeft profile`` measures it (490 MB on Linux with
a CPU build). That a CUDA context takes as much of its client is an assumption."""

SURE = 0.95
"""Probability with which no step of a run takes more than is said, where coins decide."""


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for.

    Attributes:
        weights: of all layers and the head, in the precision in which they are kept; dropped and
            frozen layers' too, since another step or another text needs them, unless they are kept
            in a file.
        trained: values of adapter and head.
        gradients: of what the step trains.
        optimizer: AdamW's moments of all that is trained.
        stored: what the active blocks, and the rest, keep for the backward.
        passing: of the largest tensors that live for a moment only.
        process: interpreter, libraries, workspaces.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    stored: int
    passing: int
    process: int

    @property
    def total(self) -> int:
        """Of the process at its peak."""
        return self.model + self.process

    @property
    def model(self) -> int:
        """What the model and its training add to a process that is there."""
        return (
            self.weights
            + self.trained
            + self.gradients
            + self.optimizer
            + self.stored
            + self.passing
        )


def step_memory(
    counts: StepCounts,
    active: int,
    frozen: int = 0,
    process: int = PROCESS_BYTES,
    held: int | None = None,
    cached: bool = True,
) -> Memory:
    """Memory of a step with so many active blocks, the largest ones.

    Where weights are kept in a file it is that of the worse moment of a turn: a step, or before it
    making the frozen layers' states, for which their weights are in memory and the others not.

    Args:
        counts: of the model with an adapter in every layer, at the batch and length wanted.
        active: how many blocks run.
        frozen: so many first layers have no adapter and do not run: their states are on the disk.
        process: of everything else.
        held: of how many blocks behind the frozen ones a turn keeps weights in memory, the largest;
            ``None`` for those of all blocks.
        cached: whether the frozen layers' states are kept; else they run in every step, and a turn
            has their weights too.

    Raises:
        DroppeftError: more active blocks than there are behind the frozen ones.
    """
    behind = counts.blocks[frozen:]
    if not 0 <= active <= len(behind):
        raise DroppeftError(f"{active} of {len(behind)} layers cannot be active")
    running = sorted(behind, key=lambda block: block.stored_bytes)[len(behind) - active :]
    trained = VALUE_BYTES * _trained((*behind, counts.rest))
    first = () if cached else counts.blocks[:frozen]
    kept = counts.blocks if held is None else (*first, *_heaviest(behind, held))
    step = Memory(
        weights=_frozen_bytes((*kept, counts.rest)),
        trained=trained,
        gradients=VALUE_BYTES * _trained((*running, counts.rest)),
        optimizer=2 * trained,
        stored=sum(block.stored_bytes for block in running) + counts.rest.stored_bytes,
        passing=counts.passing_bytes,
        process=process,
    )
    if held is None or frozen == 0 or not cached:
        return step
    building = replace(
        step,
        weights=_frozen_bytes((*counts.blocks[:frozen], counts.rest)),
        gradients=0,
        optimizer=0,
        stored=0,
    )
    return max(step, building, key=lambda memory: memory.total)


def most_active(rates: Sequence[float], sampling: str, steps: int) -> int:
    """Most blocks that run in any of so many steps.

    With ``exact`` sampling that is certain; with ``bernoulli`` it is the least number that is not
    exceeded with probability :data:`SURE`.

    Args:
        rates: probability of being dropped, one per layer.
        sampling: a key of ``droppeft.layer_dropout.SAMPLINGS``.
        steps: how many are drawn.
    """
    if sampling == "exact":
        return len(rates) - math.floor(math.fsum(rates) + 1e-9)
    below = 0.0
    for count, probability in enumerate(_active_distribution(rates)):
        below += probability
        if below**steps >= SURE:
            return count
    return len(rates)


def _active_distribution(rates: Sequence[float]) -> list[float]:
    """Probability of 0, 1, ... active blocks when each tosses a coin of its own."""
    distribution = [1.0]
    for rate in rates:
        runs = [0.0, *(value * (1 - rate) for value in distribution)]
        dropped = [*(value * rate for value in distribution), 0.0]
        distribution = [a + b for a, b in zip(runs, dropped, strict=True)]
    return distribution


def _heaviest(blocks: Sequence[BlockCounts], count: int) -> list[BlockCounts]:
    return sorted(blocks, key=lambda block: block.weight_bytes)[len(blocks) - count :]


def _frozen_bytes(parts: Sequence[BlockCounts]) -> int:
    """Of weights that are not trained."""
    return sum(part.weight_bytes for part in parts) - VALUE_BYTES * _trained(parts)


def _trained(parts: Sequence[BlockCounts]) -> int:
    return sum(part.trainable_parameters for part in parts)
