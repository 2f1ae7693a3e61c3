"""Bound what a single update can do to a merge: the norm of its change, and its weight.

The change of an update is what the client sent less what its instruction brought. Bounding its norm
is *norm clipping* (arXiv:1911.07963), with a fixed bound there. Ours: the bound follows from the
median norm of the round, and it is one per layer, since clients may send different layers; a change
beyond it is scaled to the median, so that exaggerating gains nothing, and the changes within it
keep their bytes. Nothing depends on the method, whose merge comes after this.

A change of LoRA's A and B is bounded, and not that of their product, which also grows with the
values that the clients got.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low

import numpy as np

from droppeft.config import ServerConfig
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import GlobalModel
from droppeft.messages.tensors import HEAD, Array, LayerKey, Tensors, flatten
from droppeft.sharing.aggregation import Wide

FEWEST = 3
"""Fewest values that have a meaningful median: of two, nobody can say which one is wrong."""

Received = Sequence[tuple[Instruction, Update]]
"""The updates of a round with their instructions, in the order of the instructions."""


@dataclass(frozen=True)
class Bounds:
    """What was bounded in a round.

    Attributes:
        clipped: by client whose change was scaled down in a layer, the smallest factor.
        limited: clients whose weight was limited.
    """

    clipped: Mapping[int, float]
    limited: tuple[int, ...]


def bounded(
    settings: ServerConfig,
    model: GlobalModel,
    instructions: Sequence[Instruction],
    replies: Sequence[Reply],
) -> tuple[list[Reply], Bounds]:
    """Return the replies of a round with bounded updates, and what was bounded.

    An update within its bounds is returned as it is, and so is every array that is not scaled.

    - **Norms.** The norm of a layer is that of the changes of its tensors together, in float64. The
      typical norm of a layer is the lower median over the updates that have it. If fewer than three
      have it, it is the lower median of the updates' root mean square changes outside of the head,
      times the root of the layer's size. A change of more than ``clip_norm_multiple`` times the
      typical norm is scaled to the typical norm. With fewer than three updates nothing is clipped.
    - **Weights.** ``targets`` is at most ``max_weight_multiple`` times the lower median of the
      round's targets, which with two updates is the smaller one.

    Args:
        settings: the limits.
        model: the server's model, whose values count where an instruction brought none.
        instructions: of the round.
        replies: in the same order; failures are returned as they are.
    """
    received = received_updates(instructions, replies)
    updates, clipped = _clipped(received, model, settings.clip_norm_multiple)
    weights = _weights(updates, settings.max_weight_multiple)
    limited = tuple(u.client for u, weight in zip(updates, weights, strict=True) if weight)
    changed = iter(
        replace(update, targets=weight) if weight else update
        for update, weight in zip(updates, weights, strict=True)
    )
    result = [next(changed) if isinstance(reply, Update) else reply for reply in replies]
    return result, Bounds(clipped, limited)


def received_updates(instructions: Sequence[Instruction], replies: Sequence[Reply]) -> Received:
    """Return the updates among the replies of a round, each with its instruction."""
    return [
        (instruction, reply)
        for instruction, reply in zip(instructions, replies, strict=True)
        if isinstance(reply, Update)
    ]


def begin_of(
    instruction: Instruction, model: GlobalModel, key: LayerKey, name: str, like: Array
) -> Wide:
    """Return the value, in float64, from which a client's change of a tensor is measured.

    It is what the instruction brought. Where that is nothing, as for a layer that was personal so
    far, it is the server's value; without one of this shape it is 0.

    Args:
        instruction: that the client followed.
        model: the server's model.
        key, name: of the tensor.
        like: what the client sent.
    """
    begin = instruction.tensors.get(key, {}).get(name)
    if begin is None:
        begin = model.tensors.get(key, {}).get(name)
    if begin is None or begin.shape != like.shape:
        return np.zeros(like.shape)
    return begin.astype(np.float64)


def change_of(
    instruction: Instruction, model: GlobalModel, key: LayerKey, name: str, value: Array
) -> Wide:
    """Return how a client changed a tensor, in float64."""
    return value.astype(np.float64) - begin_of(instruction, model, key, name, value)


def _clipped(
    received: Received, model: GlobalModel, multiple: float
) -> tuple[list[Update], dict[int, float]]:
    """Return the updates with bounded changes, and the smallest factor of each that was clipped."""
    if not multiple or len(received) < FEWEST:
        return [update for _, update in received], {}
    norms = [_norms(instruction, update, model) for instruction, update in received]
    typical = _typical_norms(received, norms)
    updates, clipped = [], {}
    for (instruction, update), norms_of_one in zip(received, norms, strict=True):
        factors = {
            key: typical[key] / norm
            for key, norm in norms_of_one.items()
            if key in typical and norm > multiple * typical[key]
        }
        if factors:
            clipped[update.client] = min(factors.values())
            tensors = _scaled(instruction, update, model, factors)
            update = replace(update, tensors=tensors)
        updates.append(update)
    return updates, clipped


def _norms(instruction: Instruction, update: Update, model: GlobalModel) -> dict[LayerKey, float]:
    """The norm of the change of each layer that the update has."""
    squares = dict.fromkeys(update.tensors, 0.0)
    for key, name, value in flatten(update.tensors):
        squares[key] += float(np.square(change_of(instruction, model, key, name, value)).sum())
    return {key: math.sqrt(square) for key, square in squares.items()}


def _typical_norms(
    received: Received, norms: Sequence[Mapping[LayerKey, float]]
) -> dict[LayerKey, float]:
    """The typical norm of the change of each layer that some update has, where it is known."""
    sizes = {
        key: sum(array.size for array in named.values())
        for _, update in received
        for key, named in update.tensors.items()
    }
    change = _typical_change(received, norms)
    typical = {}
    for key, size in sizes.items():
        of_layer = [norms_of_one[key] for norms_of_one in norms if key in norms_of_one]
        if len(of_layer) >= FEWEST:
            typical[key] = median_low(of_layer)
        elif change is not None:
            typical[key] = change * math.sqrt(size)
    return typical


def _typical_change(received: Received, norms: Sequence[Mapping[LayerKey, float]]) -> float | None:
    """The median root mean square change of a value outside of the head, if it is known."""
    changes = []
    for (_, update), norms_of_one in zip(received, norms, strict=True):
        layers = [key for key in update.tensors if key != HEAD]
        size = sum(array.size for key in layers for array in update.tensors[key].values())
        if size:
            changes.append(math.hypot(*(norms_of_one[key] for key in layers)) / math.sqrt(size))
    return median_low(changes) if len(changes) >= FEWEST else None


def _scaled(
    instruction: Instruction, update: Update, model: GlobalModel, factors: Mapping[LayerKey, float]
) -> Tensors:
    """The tensors, in which the change of the layers in ``factors`` is scaled."""

    def scaled(key: LayerKey, name: str, value: Array) -> Array:
        begin = begin_of(instruction, model, key, name, value)
        change = value.astype(np.float64) - begin
        return (begin + factors[key] * change).astype(value.dtype)

    return {
        key: {name: scaled(key, name, value) for name, value in named.items()}
        if key in factors
        else named
        for key, named in update.tensors.items()
    }


def _weights(updates: Sequence[Update], multiple: float) -> list[int | None]:
    """The limited weight of each update, ``None`` for those that keep their own."""
    own = [update.targets for update in updates]
    if not multiple or len(own) < 2:
        return [None] * len(own)
    most = max(1, math.floor(multiple * median_low(own)))
    return [most if weight > most else None for weight in own]
