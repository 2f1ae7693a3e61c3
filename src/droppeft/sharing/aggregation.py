"""Merge what clients shared, tensor by tensor over those who shared it.

Source: federated averaging (arXiv:1602.05629) applied by layer, as METHOD 4 of the design has it:
a tensor that nobody shared keeps its value. Averaging LoRA's A and B separately is inexact
(mean(B)·mean(A) ≠ mean(BA)); it is what FedIT does.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from droppeft.messages import Array, LayerKey, Tensors, Update

Wide = npt.NDArray[np.float64]
"""Values that are summed."""

Weight = Callable[[Update, LayerKey], float]
"""What a layer of an Update counts; not negative."""


def by_examples(update: Update, layer: LayerKey) -> float:
    """The rows that the client trained on."""
    return float(update.examples)


def by_active_steps(update: Update, layer: LayerKey) -> float:
    """The rows, times the steps in which the layer ran. Ours.

    What is in no layer counts for all steps, those too that fp16 skipped.
    """
    steps = update.active_steps[layer] if isinstance(layer, int) else update.steps
    return float(update.examples * steps)


def average_over_holders(current: Tensors, updates: Sequence[Update], weight: Weight) -> Tensors:
    """Weighted mean of every tensor over the updates that contain it.

    Args:
        current: the server's values; they decide which tensors exist and stay where unshared.
        updates: in instruction order. Sums run in that order in float64, so the result depends on
            neither the order of arrival nor the transport.
        weight: of an update's layer.
    """
    merged: dict[LayerKey, dict[str, Array]] = {}
    for key, named in current.items():
        weights = [weight(update, key) for update in updates]
        held = [update.tensors.get(key, {}) for update in updates]
        merged[key] = {
            name: _mean(value, [each.get(name) for each in held], weights)
            for name, value in named.items()
        }
    return merged


def average_over_everyone(current: Tensors, updates: Sequence[Update], weight: Weight) -> Tensors:
    """As :func:`average_over_holders`, an update without a tensor counting as the server's value.

    A control: it holds back what few clients train.
    """
    whole = [
        replace(
            update,
            tensors={
                key: {**named, **update.tensors.get(key, {})} for key, named in current.items()
            },
        )
        for update in updates
    ]
    return average_over_holders(current, whole, weight)


def _mean(current: Array, values: Sequence[Array | None], weights: Sequence[float]) -> Array:
    held = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None and w > 0]
    if not held:
        return current
    total = np.zeros(current.shape, dtype=np.float64)
    for value, weight in held:
        total += weight * value.astype(np.float64)
    return (total / sum(weight for _, weight in held)).astype(current.dtype)
