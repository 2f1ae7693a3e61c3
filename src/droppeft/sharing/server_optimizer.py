"""Server optimisers, which use the mean change of a round as a gradient.

Source: FedAvgM (arXiv:1909.06335), FedAdam and FedYogi (arXiv:2003.00295, algorithm 2). They are
applied by tensor: a tensor that no client sent keeps its value and its moments, which is ours.
"""

from collections.abc import Collection, Mapping

import numpy as np

from droppeft.config import ServerConfig
from droppeft.messages.tensors import Array, LayerKey, Tensors
from droppeft.sharing.aggregation import Wide

MOMENTUM, SECOND_MOMENTUM = 0.9, 0.99
"""Momenta of the mean change and, for ``adam`` and ``yogi``, of its square."""

TAU = 1e-3
"""Degree of adaptivity of ``adam`` and ``yogi``: a smaller value is more adaptive."""

MOMENTS = ("first", "second")

OptimizerMoments = Mapping[str, Tensors]
"""Moments that an optimiser carries from round to round, by the names :data:`MOMENTS`; empty at
first."""


def step(
    settings: ServerConfig,
    before: Tensors,
    mean: Tensors,
    sent: Collection[str],
    moments: OptimizerMoments,
) -> tuple[Tensors, OptimizerMoments]:
    """Return the server's values after a round, and the optimiser's moments.

    Let d = mean - before. ``momentum`` sets m = b m + d and adds lr m to the values. ``adam`` and
    ``yogi`` set m = b m + (1 - b) d, update second moments s of d², which are tau² at first, and
    add lr m / (sqrt(s) + tau).

    Args:
        settings: settings of the optimiser.
        before: the server's values.
        mean: mean of what clients sent; for a tensor that no client sent, the value before.
        sent: names of the tensors that a client sent.
        moments: the moments after the previous round.
    """
    values: dict[LayerKey, dict[str, Array]] = {}
    first: dict[LayerKey, dict[str, Array]] = {}
    second: dict[LayerKey, dict[str, Array]] = {}
    for key, named in before.items():
        values[key], first[key], second[key] = {}, {}, {}
        for name, value in named.items():
            m = _moment(moments, "first", key, name, value, 0.0)
            s = _moment(moments, "second", key, name, value, TAU**2)
            new_value = value
            if name in sent:
                change = mean[key][name].astype(np.float64) - value.astype(np.float64)
                m, s, increment = _moments_and_increment(settings, change, m, s)
                new_value = (value.astype(np.float64) + increment).astype(value.dtype)
            values[key][name] = new_value
            first[key][name], second[key][name] = m.astype(np.float32), s.astype(np.float32)
    if settings.optimizer == "momentum":
        return values, {"first": first}
    return values, {"first": first, "second": second}


def _moments_and_increment(
    settings: ServerConfig, change: Wide, m: Wide, s: Wide
) -> tuple[Wide, Wide, Wide]:
    """Return both moments after a change, and what is added to the values."""
    rate, b = settings.rate, MOMENTUM
    if settings.optimizer == "momentum":
        m = b * m + change
        return m, s, rate * m
    m = b * m + (1 - b) * change
    square, part = np.square(change), 1 - SECOND_MOMENTUM
    if settings.optimizer == "adam":
        s = s + part * (square - s)
    else:
        s = s - part * square * np.sign(s - square)
    return m, s, rate * m / (np.sqrt(s) + TAU)


def _moment(
    moments: OptimizerMoments, which: str, key: LayerKey, name: str, like: Array, begin: float
) -> Wide:
    known = moments.get(which)
    if known is None:
        return np.full(like.shape, begin, np.float64)
    return known[key][name].astype(np.float64)
