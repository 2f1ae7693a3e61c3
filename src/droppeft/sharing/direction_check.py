"""Leave out updates of clients whose changes have pointed against those of the others.

Ours. FLTrust (arXiv:2012.13995) compares the direction of each update with that of an update of the
server's own data; here the median of the other clients' changes takes its place. A single round
does not tell much: once the model hardly learns any more, an honest change is nearly as often
against the others as with them. So the agreement of a client is summed over its rounds, and a round
counts for more if its changes have a common direction.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from droppeft.config import ServerConfig
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Reply, Update
from droppeft.messages.server_state import GlobalModel
from droppeft.messages.tensors import LayerKey, flatten
from droppeft.sharing.aggregation import Wide
from droppeft.sharing.bounding import Received, change_of, received_updates

FEWEST_DIRECTIONS = 20
"""Fewest updates whose directions are compared. Ten clients or fewer with very unlike texts have no
direction in common, and the check would leave out honest ones (`docs/benchmarks/attacks.md`)."""

REASON = "set aside: over the run, its changes point against those of the others"


@dataclass(frozen=True)
class Directions:
    """What a round says about the directions of its updates.

    Attributes:
        agreement: by client that took part so far, the sum of its agreement over its rounds.
        opposed: the clients of the round that are left out.
    """

    agreement: Mapping[int, float]
    opposed: tuple[int, ...] = ()


def compare_directions(
    settings: ServerConfig,
    model: GlobalModel,
    instructions: Sequence[Instruction],
    replies: Sequence[Reply],
    so_far: Mapping[int, float],
) -> Directions:
    """Return each client's agreement with the others after a round, and who is left out.

    The agreement of an update is the cosine between its change and the value-wise median change of
    the others, times the square of that median's norm, in units of the round's median norm and at
    most 1. So it is between -1 and 1, and near 0 in a round in which changes have little in common.
    Each tensor is compared among the updates that have it, if they are twenty or more; of a tensor
    that has several shapes, only the part that all have is compared.

    Left out are the clients whose sum over the run is below 0, but always fewer than half of the
    updates: those with the lowest sums. Clients that are left out are compared all the same, so
    that one that agrees again comes back.

    Args:
        settings: says whether directions are compared.
        model: the server's model, whose values count where an instruction brought none.
        instructions: of the round.
        replies: in the same order, with bounded updates; failures are ignored.
        so_far: by client, the sum of its agreement before the round.
    """
    received = received_updates(instructions, replies)
    if not settings.direction_check or len(received) < FEWEST_DIRECTIONS:
        return Directions(so_far)
    found = _agreements(received, model)
    sums = {
        update.client: so_far.get(update.client, 0.0) + float(value)
        for (_, update), value in zip(received, found, strict=True)
    }
    lowest = sorted(sums, key=lambda client: sums[client])[: (len(sums) - 1) // 2]
    opposed = tuple(client for client in sums if client in lowest and sums[client] < 0)
    return Directions({**so_far, **sums}, opposed)


def without_opposed(replies: Sequence[Reply], directions: Directions) -> list[Reply]:
    """Return the replies of a round, in which the updates that are left out are failures."""
    return [
        Failure(reply.client, REASON)
        if isinstance(reply, Update) and reply.client in directions.opposed
        else reply
        for reply in replies
    ]


def _agreements(received: Received, model: GlobalModel) -> list[float]:
    """The agreement of each update with the others; 0 where nothing can be compared."""
    count = len(received)
    dots, own, median, typical = (np.zeros(count) for _ in range(4))
    for holders, changes in _changes(received, model):
        of_others = median_of_others(changes)
        squares = np.square(changes).sum(axis=1)
        dots[holders] += (changes * of_others).sum(axis=1)
        own[holders] += squares
        median[holders] += np.square(of_others).sum(axis=1)
        typical[holders] += median_low(squares)
    return [
        dot / math.sqrt(a * b) * min(1.0, b / c) if a and b and c else 0.0
        for dot, a, b, c in zip(dots, own, median, typical, strict=True)
    ]


def _changes(received: Received, model: GlobalModel) -> Iterator[tuple[list[int], Wide]]:
    """Yield the indices (m,) of the updates with a tensor, and their changes (m, values)."""
    places: dict[tuple[LayerKey, str], list[int]] = {}
    for index, (_, update) in enumerate(received):
        for key, name, _ in flatten(update.tensors):
            places.setdefault((key, name), []).append(index)
    for (key, name), holders in places.items():
        if len(holders) < FEWEST_DIRECTIONS:
            continue
        changes = [
            change_of(received[index][0], model, key, name, received[index][1].tensors[key][name])
            for index in holders
        ]
        part = tuple(slice(min(sides)) for sides in zip(*(c.shape for c in changes), strict=True))
        yield holders, np.stack([change[part].ravel() for change in changes])


def median_of_others(values: Wide) -> Wide:
    """Return for each value (n, m) the median of its column without it, for n > 2.

    It follows from the order of the column: without a value of the lower half, the median of the
    others is above the middle, and without one of the upper half it is below.
    """
    count = len(values)
    half = count // 2
    ordered = np.sort(values, axis=0)
    below, middle = ordered[half - 1], ordered[half]
    if count % 2 == 0:
        result: Wide = np.where(values < middle, middle, below)
        return result
    above = ordered[half + 1]
    pair = np.where(values < middle, middle + above, below + middle)
    sum_of_two: Wide = np.where(values == middle, below + above, pair)
    return sum_of_two / 2
