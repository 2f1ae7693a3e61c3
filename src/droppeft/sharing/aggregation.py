"""Merges the tensors that clients share, each over the clients that shared it.

Source: federated averaging (arXiv:1602.05629), by layer as in DropPEFT (arXiv:2503.10217). A tensor
that no client shared keeps its value. Averaging LoRA's A and B separately, as FedIT does, is
inexact: mean(B)·mean(A) ≠ mean(BA).
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from droppeft.messages.reply import Update
from droppeft.messages.tensors import Array, LayerKey, Tensors

Wide = npt.NDArray[np.float64]
"""Arrays in double precision, in which sums are computed."""

Weight = Callable[[Update, LayerKey], float]
"""Returns the weight of a layer of an Update; not negative."""


def by_targets(update: Update, layer: LayerKey) -> float:
    """Return the number of predictions that the client trained: rows, or tokens."""
    return float(update.targets)


def average_over_senders(current: Tensors, updates: Sequence[Update], weight: Weight) -> Tensors:
    """Return the weighted mean of every tensor over the updates that contain it.

    Args:
        current: the server's values. The result has the same tensors, and those that no update
            contains keep their value.
        updates: in the order of the instructions. Sums are computed in that order in float64, so
            the result depends neither on the order of arrival nor on the transport.
        weight: returns the weight of a layer of an update.
    """
    merged: dict[LayerKey, dict[str, Array]] = {}
    for key, named in current.items():
        weights = [weight(update, key) for update in updates]
        held = [update.tensors.get(key, {}) for update in updates]
        merged[key] = {
            name: _mean(value, [tensors.get(name) for tensors in held], weights)
            for name, value in named.items()
        }
    return merged


def _mean(current: Array, values: Sequence[Array | None], weights: Sequence[float]) -> Array:
    held = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None and w > 0]
    if not held:
        return current
    total = np.zeros(current.shape, dtype=np.float64)
    for value, weight in held:
        total += weight * value.astype(np.float64)
    return (total / sum(weight for _, weight in held)).astype(current.dtype)
