"""Peak memory of a training process, by what it is used for.

Ours. Stored activations and temporary tensors are counted (:mod:`droppeft.costs.fake_step`); the
rest is computed: trained values are in fp32, each with a gradient and AdamW's two moments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.errors import DroppeftError

VALUE_BYTES = 4
"""Bytes of a trained value, which is in fp32."""

PROCESS_BYTES = 500_000_000
"""Memory of a process that has loaded Python, torch, transformers and peft and has trained a small
model once: its own memory and the code that it has read. ``droppeft profile`` measures it (490 MB
on Linux with a CPU build). That a CUDA context takes as much of its device is an assumption."""

CONFIDENCE = 0.95
"""Probability that no step of a run takes more memory than estimated, where layers are dropped
independently."""


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are used for.

    Attributes:
        weights: frozen weights of all layers and the head, in the precision in which they are
            stored. Those of dropped and frozen layers count too, since another step or row needs
            them, unless they are offloaded to a file.
        trained: values of adapter and head.
        gradients: of what the step trains.
        optimizer: AdamW's moments of all that is trained.
        stored: what the active blocks and the rest save for the backward.
        passing: temporary tensors, at their peak.
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
        """Peak of the whole process."""
        return self.model + self.process

    @property
    def model(self) -> int:
        """What the model and its training add to a process without them."""
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
    loaded: int | None = None,
    cached: bool = True,
    start: int = 0,
) -> Memory:
    """Memory of a step that trains a number of blocks, taken to be the largest ones.

    With offloading there are two phases: the training step, and before it the computation of the
    cached hidden states, which needs the frozen layers' weights and no others. The phase that takes
    more memory is returned.

    Args:
        counts: of the model with an adapter in every layer, at the wanted batch size and length.
        active: number of blocks that are trained.
        frozen: number of first layers without an adapter.
        process: memory of everything but the model.
        loaded: with offloading, the number of blocks after the frozen ones whose weights are in
            memory during local training, taken to be the largest; ``None`` for all blocks.
        cached: whether the frozen layers' hidden states are cached. If not, frozen layers run in
            every step, and their weights stay in memory.
        start: the lowest layer that any step trains; the adapters below it are not trained.

    Raises:
        DroppeftError: more active blocks than there are from the lowest trained one on.
    """
    adapted = counts.blocks[frozen:]
    reached = counts.blocks[max(frozen, start) :]
    if not 0 <= active <= len(reached):
        raise DroppeftError(f"{active} of {len(reached)} layers cannot be active")
    running = sorted(reached, key=lambda block: block.stored_bytes)[len(reached) - active :]
    trained = VALUE_BYTES * _trained((*adapted, counts.rest))
    first = () if cached else counts.blocks[:frozen]
    in_memory = counts.blocks if loaded is None else (*first, *_heaviest(adapted, loaded))
    step = Memory(
        weights=_frozen_bytes((*in_memory, counts.rest)),
        trained=trained,
        gradients=VALUE_BYTES * _trained((*running, counts.rest)),
        optimizer=2 * VALUE_BYTES * _trained((*reached, counts.rest)),
        stored=sum(block.stored_bytes for block in running) + counts.rest.stored_bytes,
        passing=counts.passing_bytes,
        process=process,
    )
    if loaded is None or frozen == 0 or not cached:
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
    """Largest number of blocks that run in any of some steps.

    With ``exact`` sampling it is never exceeded. With ``bernoulli`` sampling it is the smallest
    number that is not exceeded with probability :data:`CONFIDENCE`.

    Args:
        rates: drop rate of each layer.
        sampling: a key of ``droppeft.layer_dropout.SAMPLINGS``.
        steps: number of steps.
    """
    if sampling == "exact":
        return len(rates) - math.floor(math.fsum(rates) + 1e-9)
    below = 0.0
    for count, probability in enumerate(_active_distribution(rates)):
        below += probability
        if below**steps >= CONFIDENCE:
            return count
    return len(rates)


def _active_distribution(rates: Sequence[float]) -> list[float]:
    """Probability of 0, 1, ... active blocks where each is dropped independently."""
    distribution = [1.0]
    for rate in rates:
        runs = [0.0, *(value * (1 - rate) for value in distribution)]
        dropped = [*(value * rate for value in distribution), 0.0]
        distribution = [a + b for a, b in zip(runs, dropped, strict=True)]
    return distribution


def _heaviest(blocks: Sequence[BlockCounts], count: int) -> list[BlockCounts]:
    return sorted(blocks, key=lambda block: block.weight_bytes)[len(blocks) - count :]


def _frozen_bytes(parts: Sequence[BlockCounts]) -> int:
    """Bytes of the weights that are not trained."""
    return sum(part.weight_bytes for part in parts) - VALUE_BYTES * _trained(parts)


def _trained(parts: Sequence[BlockCounts]) -> int:
    return sum(part.trainable_parameters for part in parts)
