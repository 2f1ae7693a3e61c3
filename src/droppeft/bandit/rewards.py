"""What a turn was worth, by which arms are judged: in one of two ways. Ours.

``loss``: the decrease of the loss on the client's own validation rows. The client measures it, and
part of what it sees is how its own labels are distributed.

``agreement``: how far the turn moved the adapter where the round's other turns moved it. If clients
move along the gradient of the common loss, plus what is their own, the product of one's change with
the mean change of the others is, to first order, by how much it lowers the common loss. No client
has to measure anything.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from droppeft.federated_method import Setup
from droppeft.messages import HEAD, Instruction, LayerKey, Reply, Update

Matrix = npt.NDArray[np.float64]
Changes = Mapping[tuple[LayerKey, str], Matrix]


def rewards_of(
    setup: Setup, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> list[float | None]:
    """The reward of every instruction's turn; ``None`` of one that was not merged or that shows
    nothing.

    Args:
        plans: of a round.
        replies: in their order.
    """
    if setup.config.configurator.reward == "loss":
        return [reply.reward if isinstance(reply, Update) else None for reply in replies]
    answered = zip(instructions, replies, strict=True)
    merged = [(instruction, reply) for instruction, reply in answered if isinstance(reply, Update)]
    changes = [_changes(instruction, update) for instruction, update in merged]
    found = iter(agreements(changes, [float(update.examples) for _, update in merged]))
    return [next(found) if isinstance(reply, Update) else None for reply in replies]


def agreements(changes: Sequence[Changes], weights: Sequence[float]) -> list[float | None]:
    """Product of each change with the weighted mean of the others', over the mean size of these.

    A tensor counts over those who changed it; ``None`` for a change that shares no tensor with
    another, and for all where nothing moved.

    Args:
        changes: of each turn, by tensor.
        weights: of each turn in the mean.
    """
    sums: dict[tuple[LayerKey, str], tuple[Matrix, float]] = {}
    for change, weight in zip(changes, weights, strict=True):
        for key, moved in change.items():
            total, weighed = sums.get(key, (np.zeros_like(moved), 0.0))
            sums[key] = (total + weight * moved, weighed + weight)
    products: list[float | None] = []
    for change, weight in zip(changes, weights, strict=True):
        parts = [
            float(np.vdot(moved, (sums[key][0] - weight * moved) / (sums[key][1] - weight)))
            for key, moved in change.items()
            if sums[key][1] > weight
        ]
        products.append(sum(parts) if parts else None)
    sizes = [abs(product) for product in products if product is not None]
    typical = sum(sizes) / len(sizes) if sizes else 0.0
    return [None if one is None or typical == 0 else one / typical for one in products]


def _changes(instruction: Instruction, update: Update) -> Changes:
    """Of what the instruction brought; the head, which learns each client's own labels, is left
    out.
    """
    return {
        (key, name): np.subtract(array, instruction.tensors[key][name], dtype=np.float64)
        for key, named in update.tensors.items()
        if key != HEAD
        for name, array in named.items()
        if name in instruction.tensors.get(key, {})
    }
