"""Robust ways to combine a round's updates: median, trimmed mean, Krum and multi-Krum.

Coordinate-wise median and trimmed mean: arXiv:1803.01498. Krum and multi-Krum: arXiv:1703.02757.
Ours: they work beside the merge of any method, and where clients send different layers. ``median``
and ``trimmed_mean`` replace each tensor of an update by the robust value over all updates that have
it, so that every weighted mean of these values is the robust value. ``krum`` and ``multi_krum`` set
updates aside before the method merges the others.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from droppeft.config import ServerConfig
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Reply, Update
from droppeft.messages.server_state import GlobalModel
from droppeft.messages.tensors import Array, LayerKey, flatten
from droppeft.sharing.aggregation import Wide
from droppeft.sharing.bounding import FEWEST, Received, change_of, received_updates

COORDINATE_RULES = ("median", "trimmed_mean")
"""Rules that combine values."""

CHOOSING_RULES = ("krum", "multi_krum")
"""Rules that choose updates."""


def fewest_updates(settings: ServerConfig) -> int:
    """Return with how many updates a round can be merged: 1, or 3 with a robust rule."""
    return 1 if settings.merge == "mean" else FEWEST


def clients_set_aside(
    settings: ServerConfig,
    model: GlobalModel,
    instructions: Sequence[Instruction],
    replies: Sequence[Reply],
) -> tuple[int, ...]:
    """Return the clients whose updates ``krum`` or ``multi_krum`` does not choose.

    Args:
        settings: the rule, and the share of malicious updates that it assumes.
        model: the server's model.
        instructions: of the round.
        replies: in the same order, as they were received: a huge change is easier to tell from
            others before it is clipped.
    """
    received = received_updates(instructions, replies)
    if settings.merge not in CHOOSING_RULES or len(received) < FEWEST:
        return ()
    chosen = _chosen(settings, received, model)
    return tuple(u.client for index, (_, u) in enumerate(received) if index not in chosen)


def combined(
    settings: ServerConfig, replies: Sequence[Reply], set_aside: Collection[int]
) -> list[Reply]:
    """Return the replies that the method merges.

    Args:
        settings: the rule.
        replies: of a round, with bounded updates; failures are returned as they are.
        set_aside: the clients whose updates become failures.
    """
    if settings.merge in COORDINATE_RULES:
        return _with_robust_values(settings, replies)
    reason = f"set aside: server.merge={settings.merge} found other updates nearer to each other"
    return [
        Failure(reply.client, reason)
        if isinstance(reply, Update) and reply.client in set_aside
        else reply
        for reply in replies
    ]


def _malicious(settings: ServerConfig, updates: int) -> int:
    """How many of these updates are assumed to be malicious."""
    # In binary floating point, 30 * 0.1 is slightly more than 3.
    return math.ceil(round(settings.malicious_fraction * updates, 6))


def _with_robust_values(settings: ServerConfig, replies: Sequence[Reply]) -> list[Reply]:
    """The replies, in which updates have the robust value of each tensor over its senders."""
    sent: dict[tuple[LayerKey, str], list[Array]] = {}
    for reply in replies:
        for key, name, value in flatten(reply.tensors) if isinstance(reply, Update) else ():
            sent.setdefault((key, name), []).append(value)
    values = {place: _robust(settings, arrays) for place, arrays in sent.items()}
    return [
        replace(
            reply,
            tensors={
                key: {name: values[key, name] for name in named}
                for key, named in reply.tensors.items()
            },
        )
        if isinstance(reply, Update)
        else reply
        for reply in replies
    ]


def _robust(settings: ServerConfig, arrays: Sequence[Array]) -> Array:
    """The median or the trimmed mean of each value; of one or two arrays, both are the mean."""
    ordered = np.sort(np.stack(arrays).astype(np.float64), axis=0)
    most = (len(arrays) - 1) // 2
    cut = most if settings.merge == "median" else min(_malicious(settings, len(arrays)), most)
    middle: Wide = ordered[cut : len(arrays) - cut].mean(axis=0)
    return middle.astype(arrays[0].dtype)


def _chosen(settings: ServerConfig, received: Received, model: GlobalModel) -> list[int]:
    """Indices of the updates that Krum or multi-Krum keeps.

    The score of an update is the sum of its distances to its n - f - 2 nearest others, at least to
    one, where f of the n updates are assumed to be malicious. Multi-Krum keeps n - f updates. Both
    are proven to help only with n > 2 f + 2.
    """
    count = len(received)
    malicious = _malicious(settings, count)
    near = np.sort(distances(received, model), axis=1)[:, 1 : max(2, count - malicious - 1)]
    kept = 1 if settings.merge == "krum" else count - malicious
    return [int(index) for index in np.argsort(near.sum(axis=1), kind="stable")[:kept]]


def distances(received: Received, model: GlobalModel) -> Wide:
    """Return the distance (n, n) between the changes of any two updates.

    It is the mean square difference per value, over the tensors that both have. Of a tensor that
    has several shapes, as LoRA's matrices of different ranks, only the part that all have is
    compared. Two updates without a common tensor are as far apart as the farthest pair.
    """
    count = len(received)
    squares, sizes = np.zeros((count, count)), np.zeros((count, count))
    places = dict.fromkeys((key, name) for _, u in received for key, name, _ in flatten(u.tensors))
    for key, name in places:
        holders = [index for index, (_, u) in enumerate(received) if name in u.tensors.get(key, {})]
        changes = [
            change_of(received[index][0], model, key, name, received[index][1].tensors[key][name])
            for index in holders
        ]
        part = tuple(slice(min(sides)) for sides in zip(*(c.shape for c in changes), strict=True))
        stacked = np.stack([change[part] for change in changes]).reshape(len(holders), -1)
        for place, index in enumerate(holders):
            squares[index, holders] += np.square(stacked - stacked[place]).sum(axis=1)
            sizes[index, holders] += stacked.shape[1]
    known = sizes > 0
    result = np.divide(squares, sizes, out=np.zeros_like(squares), where=known)
    return np.where(known | np.eye(count, dtype=bool), result, result.max())
