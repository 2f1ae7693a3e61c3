"""Drop rates of layers: a mean rate, distributed over depth by a shape.

Source: layer rates with a mean and a distribution over depth are from DropPEFT
(arXiv:2503.10217). The formulas of the shapes, and the redistribution of rates above 1, are ours.
"""

import math
from collections.abc import Callable, Collection, Sequence

from droppeft.errors import DroppeftError

# A mean that exceeds the largest possible one by less than this is a rounding error.
ROUNDING = 1e-9
# A rate from here on counts as 1, so that the largest possible mean drops layers with certainty.
_FULL = 1 - 1e-12


def _uniform(num_layers: int) -> tuple[float, ...]:
    return (1.0,) * num_layers


def _incremental(num_layers: int) -> tuple[float, ...]:
    return tuple(float(depth) for depth in range(1, num_layers + 1))


def _decay(num_layers: int) -> tuple[float, ...]:
    return _incremental(num_layers)[::-1]


def _normal(num_layers: int) -> tuple[float, ...]:
    middle, width = (num_layers - 1) / 2, num_layers / 4
    return tuple(math.exp(-(((layer - middle) / width) ** 2) / 2) for layer in range(num_layers))


SHAPES: dict[str, Callable[[int], tuple[float, ...]]] = {
    "uniform": _uniform,
    "incremental": _incremental,
    "decay": _decay,
    "normal": _normal,
}
"""By name, a function from the number of layers L to L positive weights. Only their ratios matter.

``uniform``: all equal. ``incremental``: proportional to depth, 1 to L. ``decay``: the reverse.
``normal``: a Gaussian around the middle layer with standard deviation L/4. The formulas are ours.
"""


def layer_rates(
    mean: float, shape: str, num_layers: int, *, protected: Collection[int] = ()
) -> tuple[float, ...]:
    """Distribute a mean drop rate over depth.

    Rates are proportional to the weights of the shape, as in :func:`weighted_rates`.

    Args:
        mean: mean rate over all L layers, in [0, 1]. Protected layers count as 0.
        shape: a key of :data:`SHAPES`.
        num_layers: number of layers L.
        protected: indices of layers that are never dropped; 0 is nearest the input.

    Returns:
        L probabilities of being dropped. Their sum is within 1e-9 of mean x L.

    Raises:
        DroppeftError: if the shape is unknown, there are no layers, the mean is outside [0, 1] or
            above (L - protected) / L, or a protected layer does not exist.
    """
    _check_layers(num_layers)
    if shape not in SHAPES:
        raise DroppeftError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")
    return weighted_rates(mean, SHAPES[shape](num_layers), protected=protected)


def weighted_rates(
    mean: float, weights: Sequence[float], *, protected: Collection[int] = ()
) -> tuple[float, ...]:
    """Distribute a mean drop rate over layers in proportion to weights.

    What would exceed 1 is redistributed, in the same proportions, over the unprotected layers below
    1 (water-filling).

    Args:
        mean: mean rate over all L layers, in [0, 1]. Protected layers count as 0.
        weights: L positive numbers, of which only the ratios matter.
        protected: indices of layers that are never dropped; 0 is nearest the input.

    Returns:
        L probabilities of being dropped. Their sum is within 1e-9 of mean x L.

    Raises:
        DroppeftError: if there are no layers, a weight is not positive, the mean is outside [0, 1]
            or above (L - protected) / L, or a protected layer does not exist.
    """
    num_layers = len(weights)
    _check_layers(num_layers)
    check_mean(mean)
    for layer, weight in enumerate(weights):
        if not 0 < weight < math.inf:
            raise DroppeftError(f"the weight of layer {layer} is {weight}; it must be above 0")
    never_dropped = _existing_layers(protected, num_layers)
    droppable = num_layers - len(never_dropped)
    total = mean * num_layers
    if total > droppable + ROUNDING:
        # Rounded down, so that the largest mean in the message is itself accepted.
        largest = droppable * 10_000 // num_layers / 10_000
        raise DroppeftError(
            f"a mean drop rate of {mean:g} over {num_layers} layers is impossible with "
            f"{len(never_dropped)} of them protected: the largest possible mean is {largest:g}; "
            "lower the mean or protect fewer layers"
        )
    return _fill(
        {layer: weights[layer] for layer in range(num_layers) if layer not in never_dropped},
        total,
        num_layers,
    )


def check_mean(mean: float) -> None:
    """Check that a mean drop rate is possible at all.

    Raises:
        DroppeftError: if it is outside [0, 1].
    """
    if not 0 <= mean <= 1:
        raise DroppeftError(f"the mean drop rate is {mean}; it must lie between 0 and 1")


def protected_ends(num_layers: int, first: int, last: int) -> frozenset[int]:
    """Return the indices of the first ``first`` and the last ``last`` layers.

    Raises:
        DroppeftError: if a number is negative, or their sum is above the number of layers.
    """
    _check_layers(num_layers)
    if first < 0 or last < 0:
        raise DroppeftError(
            f"cannot protect {first} first and {last} last layers; neither may be negative"
        )
    if first + last > num_layers:
        raise DroppeftError(
            f"cannot protect {first} first and {last} last layers of a model with {num_layers}; "
            f"protect {num_layers} at most"
        )
    return frozenset(range(first)) | frozenset(range(num_layers - last, num_layers))


def explicit_rates(rates: Sequence[float], num_layers: int) -> tuple[float, ...]:
    """Check drop rates that are given for each layer.

    Returns:
        The same L rates, as floats.

    Raises:
        DroppeftError: if there is not one rate per layer, or a rate is outside [0, 1].
    """
    if len(rates) != num_layers:
        raise DroppeftError(
            f"{len(rates)} drop rates were given for {num_layers} layers; give one per layer"
        )
    for layer, rate in enumerate(rates):
        if not 0 <= rate <= 1:
            raise DroppeftError(
                f"the drop rate of layer {layer} is {rate}; it must lie between 0 and 1"
            )
    return tuple(map(float, rates))


def _fill(weights: dict[int, float], total: float, num_layers: int) -> tuple[float, ...]:
    """Distribute ``total`` by weight, with no rate above 1. Layers without a weight get 0."""
    rates = [0.0] * num_layers
    below = dict(weights)
    while below:
        scale = total / math.fsum(below.values())
        full = [layer for layer, weight in below.items() if weight * scale >= _FULL]
        if not full:
            for layer, weight in below.items():
                rates[layer] = weight * scale
            break
        for layer in full:
            rates[layer] = 1.0
            del below[layer]
        total = max(0.0, total - len(full))
    return tuple(rates)


def _check_layers(num_layers: int) -> None:
    if num_layers < 1:
        raise DroppeftError(f"a model with {num_layers} layers has nothing to drop")


def _existing_layers(layers: Collection[int], num_layers: int) -> frozenset[int]:
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise DroppeftError(
                f"layer {layer} cannot be protected: the layers are 0 to {num_layers - 1}"
            )
    return frozenset(layers)
