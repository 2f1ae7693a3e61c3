"""Client-level differential privacy: clip each client's change, add noise, take the mean.

Source: DP-FedAvg (arXiv:1710.06963) with fixed weights and the Gaussian mechanism. A client's
change is one vector of all tensors that clients may send; what it does not send is 0. The sum of
the clipped changes gets noise in every value, also of tensors that nobody sent, and is divided by
the expected number of clients. One client therefore changes the sum by the clipping norm at most,
whatever the others send.

Drawing clients and noise from the operating system's randomness, and rounding out the noise, is
ours.
"""

import os
import secrets
from collections.abc import Mapping, Sequence

import numpy as np

from droppeft.config import Config
from droppeft.messages.reply import MeasuredCost, Reply, Update
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import Array, LayerKey, Tensors, flatten
from droppeft.sharing.aggregation import Wide

DRAWS = 4
"""Draws whose sum is one value of noise, so that it cannot be read off how floating-point numbers
are spaced (arXiv:2107.10138)."""

NO_COST = MeasuredCost(0.0, 0.0, 0.0, 0, 0, 0, (), (), 0)


def draw_privately(config: Config) -> list[int]:
    """Draw each client with probability cohort_size/clients, from the system's randomness.

    The draw must be secret: which clients took part must not follow from the run's seed.
    """
    probability = config.cohort_size / config.clients
    random = secrets.SystemRandom()
    return [client for client in range(config.clients) if random.random() < probability]


def private_update(
    config: Config, state: ServerState, names: frozenset[str], replies: Sequence[Reply]
) -> Update:
    """Return one update that stands for all updates of a round.

    Its tensors are the server's values plus the noisy mean of the clipped changes.

    Args:
        config: of the run.
        state: before the round.
        names: tensors that clients may send; noise is added to all of them.
        replies: of the round, checked; those that are no updates count as changes of 0.
    """
    privacy = config.privacy
    assert privacy.noise_multiplier is not None
    base: dict[tuple[LayerKey, str], Array] = {
        (key, name): array for key, name, array in flatten(state.model.tensors) if name in names
    }
    total: dict[tuple[LayerKey, str], Wide] = {
        place: np.zeros(array.shape, np.float64) for place, array in base.items()
    }
    for reply in replies:
        if isinstance(reply, Update):
            for place, change in clipped_change(reply.tensors, base, privacy.clip_norm).items():
                total[place] += change
    tensors: dict[LayerKey, dict[str, Array]] = {}
    for (key, name), array in base.items():
        noise = gaussian(array.shape, privacy.noise_multiplier * privacy.clip_norm)
        change = (total[key, name] + noise) / config.cohort_size
        tensors.setdefault(key, {})[name] = (array.astype(np.float64) + change).astype(np.float32)
    layers = len(state.model.adapter.layers)
    return Update(
        round=0,
        client=0,
        nonce="",
        tensors=tensors,
        examples=1,
        targets=1,
        steps=1,
        active_steps=(1,) * layers,
        importance=(0.0,) * layers,
        train_loss=0.0,
        reward=None,
        cost=NO_COST,
    )


def clipped_change(
    tensors: Tensors, base: Mapping[tuple[LayerKey, str], Array], clip_norm: float
) -> dict[tuple[LayerKey, str], Wide]:
    """Return what a client changed, scaled down to a norm of ``clip_norm`` if it is larger.

    Args:
        tensors: what the client sent.
        base: the values that it got.
        clip_norm: largest norm of all changes together.
    """
    changes = {
        (key, name): array.astype(np.float64) - base[key, name].astype(np.float64)
        for key, name, array in flatten(tensors)
    }
    norm = float(np.sqrt(sum(np.square(change).sum() for change in changes.values())))
    if norm <= clip_norm:
        return changes
    factor = clip_norm / norm * (1 - 1e-12)  # rounding must not give a larger norm
    return {place: factor * change for place, change in changes.items()}


def gaussian(shape: tuple[int, ...], deviation: float) -> Wide:
    """Return normally distributed values from the operating system's randomness.

    Args:
        shape: of the result.
        deviation: standard deviation.
    """
    summed: Wide = np.zeros(shape)
    for _ in range(DRAWS):
        first, second = _uniform(shape), _uniform(shape)
        summed += np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)  # Box-Muller
    summed *= deviation / float(np.sqrt(DRAWS))
    return summed


def _uniform(shape: tuple[int, ...]) -> Wide:
    """Return values in (0, 1)."""
    bits = np.frombuffer(os.urandom(8 * int(np.prod(shape))), np.uint64) >> np.uint64(11)
    return ((bits.astype(np.float64) + 0.5) * 2.0**-53).reshape(shape)
