"""Rewards of local trainings, from which the bandit learns; ``configurator.reward`` selects. Ours.

``loss``: the decrease of the loss on the client's own validation rows. The client measures it. It
partly reflects the distribution of the client's own labels.

``agreement``: how far the local training moved the adapter in the direction of the round's other
local trainings. If each client's change is a step along the gradient of the common loss plus an
independent part, the product of a change with the mean change of the others is, to first order, the
decrease of the common loss. Clients measure nothing.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from droppeft.bandit.layer_values import Changes, observed_values
from droppeft.federated_method import Setup
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply, Update
from droppeft.messages.tensors import HEAD, LayerKey

Matrix = npt.NDArray[np.float64]


def rewards_of(
    setup: Setup, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> list[float | None]:
    """The reward of each local training; ``None`` if it was not merged or has no reward.

    Args:
        instructions: instructions of a round.
        replies: the replies to them, in the same order.
    """
    if setup.config.configurator.reward == "loss":
        return [reply.reward if isinstance(reply, Update) else None for reply in replies]
    merged = _merged(instructions, replies)
    changes = [_changes(instruction, update) for instruction, update in merged]
    rewards = iter(agreements(changes, [float(update.targets) for _, update in merged]))
    return [next(rewards) if isinstance(reply, Update) else None for reply in replies]


def values_of_layers(
    instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> dict[int, float]:
    """What training each layer was worth in a round; see :mod:`droppeft.bandit.layer_values`."""
    merged = _merged(instructions, replies)
    return observed_values(
        [_changes(instruction, update) for instruction, update in merged],
        [update.importance for _, update in merged],
        [float(update.targets) for _, update in merged],
    )


def _merged(
    instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> list[tuple[Instruction, Update]]:
    pairs = zip(instructions, replies, strict=True)
    return [(instruction, reply) for instruction, reply in pairs if isinstance(reply, Update)]


def agreements(changes: Sequence[Changes], weights: Sequence[float]) -> list[float | None]:
    """Product of each change with the weighted mean of the other changes, scaled to mean size 1.

    The mean of a tensor is taken over the changes that contain it. The result is ``None`` for a
    change that has no tensor in common with another one, and for all changes if all products are 0.

    Args:
        changes: the change of each local training, by tensor.
        weights: the weight of each local training in the mean.
    """
    sums: dict[tuple[LayerKey, str], tuple[Matrix, float]] = {}
    for change, weight in zip(changes, weights, strict=True):
        for key, moved in change.items():
            total, total_weight = sums.get(key, (np.zeros_like(moved), 0.0))
            sums[key] = (total + weight * moved, total_weight + weight)
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
    return [None if product is None or typical == 0 else product / typical for product in products]


def _changes(instruction: Instruction, update: Update) -> Changes:
    """Changes of the tensors that the instruction brought, without the head.

    The head is left out because it learns the distribution of a client's own labels.
    """
    return {
        (key, name): np.subtract(array, instruction.tensors[key][name], dtype=np.float64)
        for key, named in update.tensors.items()
        if key != HEAD
        for name, array in named.items()
        if name in instruction.tensors.get(key, {})
    }
