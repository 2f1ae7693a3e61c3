"""Server optimisers: the mean change of a round is taken for a gradient.

Source: FedAvgM (arXiv:1909.06335) and FedAdam, FedYogi (arXiv:2003.00295, algorithm 2), by tensor:
one that nobody sent in a round keeps its value and its moments, which is ours.
"""

from collections.abc import Collection, Mapping

import numpy as np

from droppeft.config import ServerConfig
from droppeft.messages import Array, LayerKey, Tensors
from droppeft.sharing.aggregation import Wide

MOMENTS = ("first", "second")

GradientMoments = Mapping[str, Tensors]
"""What an optimiser carries from round to round, by :data:`MOMENTS`; nothing at the beginning."""


def step(
    settings: ServerConfig,
    before: Tensors,
    mean: Tensors,
    sent: Collection[str],
    moments: GradientMoments,
) -> tuple[Tensors, GradientMoments]:
    """The server's values after a round, and its moments.

    With change d = mean - before: ``momentum`` has m = b m + d and moves by lr m; ``adam`` and
    ``yogi`` have m = b m + (1 - b) d, second moments s of d², which begin at tau², and move by
    lr m / (sqrt(s) + tau).

    Args:
        settings: of an optimiser.
        before: the server's values.
        mean: of what clients sent; the value before where nobody did.
        sent: names of the tensors that someone sent.
        moments: after the round before.
    """
    values: dict[LayerKey, dict[str, Array]] = {}
    first: dict[LayerKey, dict[str, Array]] = {}
    second: dict[LayerKey, dict[str, Array]] = {}
    for key, named in before.items():
        values[key], first[key], second[key] = {}, {}, {}
        for name, value in named.items():
            m = _moment(moments, "first", key, name, value, 0.0)
            s = _moment(moments, "second", key, name, value, settings.tau**2)
            moved = value
            if name in sent:
                change = mean[key][name].astype(np.float64) - value.astype(np.float64)
                m, s, by = _moved(settings, change, m, s)
                moved = (value.astype(np.float64) + by).astype(value.dtype)
            values[key][name] = moved
            first[key][name], second[key][name] = m.astype(np.float32), s.astype(np.float32)
    if settings.optimizer == "momentum":
        return values, {"first": first}
    return values, {"first": first, "second": second}


def _moved(settings: ServerConfig, change: Wide, m: Wide, s: Wide) -> tuple[Wide, Wide, Wide]:
    """Both moments after a change, and the move."""
    rate, b = settings.rate, settings.momentum
    if settings.optimizer == "momentum":
        m = b * m + change
        return m, s, rate * m
    m = b * m + (1 - b) * change
    square, part = np.square(change), 1 - settings.second_momentum
    if settings.optimizer == "adam":
        s = s + part * (square - s)
    else:
        s = s - part * square * np.sign(s - square)
    return m, s, rate * m / (np.sqrt(s) + settings.tau)


def _moment(
    moments: GradientMoments, which: str, key: LayerKey, name: str, like: Array, begin: float
) -> Wide:
    known = moments.get(which)
    if known is None:
        return np.full(like.shape, begin, np.float64)
    return known[key][name].astype(np.float64)
