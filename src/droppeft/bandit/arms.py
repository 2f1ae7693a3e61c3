"""Arms: drop rates and untrained layers that a client may be given. Ours."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import SHAPES, protected_ends, weighted_rates

IMPORTANCE = "importance"
"""The shape whose rates are inversely proportional to the importance of the layers."""

LEAST_PART = 1e-9
"""An importance below this part of the largest counts as unknown."""


@dataclass(frozen=True)
class Arm:
    """What a client drops and trains in one local training.

    Attributes:
        mean: mean drop rate over the trained layers; protected layers count with 0.
        shape: shape of the rates over these layers: a key of ``SHAPES``, or :data:`IMPORTANCE`.
        untrained: share of the layers above the frozen ones, from the lowest, that run and are not
            trained.
    """

    mean: float
    shape: str
    untrained: float

    @property
    def label(self) -> str:
        """The arm in words, for reports."""
        untrained = f", first {self.untrained:.0%} not trained" if self.untrained else ""
        if not self.mean:
            return f"nothing dropped{untrained}"
        shape = "" if self.shape == "uniform" else f" ({self.shape})"
        return f"{self.mean:.0%} dropped{shape}{untrained}"


@dataclass(frozen=True)
class Depth:
    """The layers to which arms apply.

    Attributes:
        layers: number of layers L.
        frozen: number of frozen layers.
        protect_first, protect_last: how many of the first and last trained layers are never
            dropped.
    """

    layers: int
    frozen: int
    protect_first: int
    protect_last: int


def candidates(
    means: Sequence[float], shapes: Sequence[str], untrained: Sequence[float], depth: Depth
) -> tuple[Arm, ...]:
    """All combinations that are possible with the protected layers, without duplicates.

    Raises:
        DroppeftError: if no combination is possible.
    """
    combinations = (
        _normalised(Arm(mean, shape, untrained), depth)
        for untrained, mean, shape in itertools.product(untrained, means, shapes)
    )
    arms = tuple(dict.fromkeys(arm for arm in combinations if is_possible(arm, depth)))
    if not arms:
        raise DroppeftError(
            f"no arm of the configurator is possible in {depth.layers} layers if the first "
            f"{depth.protect_first} and the last {depth.protect_last} trained layers are "
            "protected; lower configurator.means, or protect fewer"
        )
    return arms


def _normalised(arm: Arm, depth: Depth) -> Arm:
    """The same for arms that behave alike.

    An arm that drops nothing gets the uniform shape, and ``untrained`` becomes a share of whole
    layers.
    """
    trainable = depth.layers - depth.frozen
    untrained = (first_trained(arm, depth) - depth.frozen) / trainable
    return Arm(arm.mean, arm.shape if arm.mean else "uniform", untrained)


def is_possible(arm: Arm, depth: Depth) -> bool:
    """Whether an arm trains a layer, and enough layers are unprotected to reach its mean rate."""
    try:
        arm_rates(arm, depth, None)
    except DroppeftError:
        return False
    return True


def first_trained(arm: Arm, depth: Depth) -> int:
    """Index of the first layer that is trained."""
    return depth.frozen + round(arm.untrained * (depth.layers - depth.frozen))


def arm_rates(arm: Arm, depth: Depth, importance: Sequence[float] | None) -> tuple[float, ...]:
    """Drop rate of each of the L layers; 0 below the first trained layer.

    Args:
        importance: importance of each layer, for the shape :data:`IMPORTANCE`. While it is unknown,
            that shape is uniform.

    Raises:
        DroppeftError: if the mean is impossible, or if no layer is trained.
    """
    lower = first_trained(arm, depth)
    trained = depth.layers - lower
    if trained < 1:
        raise DroppeftError(
            "an arm of the configurator trains no layer; lower configurator.untrained"
        )
    protected = protected_ends(trained, depth.protect_first, depth.protect_last)
    weights = _weights(arm.shape, trained, importance[lower:] if importance else None)
    return (0.0,) * lower + weighted_rates(arm.mean, weights, protected=protected)


def _weights(shape: str, layers: int, importance: Sequence[float] | None) -> Sequence[float]:
    if shape != IMPORTANCE:
        return SHAPES[shape](layers)
    if importance is None or min(importance) <= LEAST_PART * max(importance):
        return (1.0,) * layers
    return tuple(1 / value for value in importance)


def neighbours(
    arm: Arm, step: float, shapes: Sequence[str], depth: Depth, *, several_depths: bool = True
) -> tuple[Arm, ...]:
    """Possible arms that differ from an arm in its mean, its shape or one untrained layer.

    Args:
        step: difference of the mean.
        shapes: shapes that may be used.
        several_depths: whether the share of untrained layers may change.
    """
    layer = 1 / (depth.layers - depth.frozen)
    changed = [
        *(replace(arm, mean=round(arm.mean + change, 6)) for change in (-step, step)),
        *(replace(arm, shape=shape) for shape in shapes),
        *(
            replace(arm, untrained=arm.untrained + change)
            for change in (-layer, layer)
            if several_depths
        ),
    ]
    valid = [near for near in changed if 0 <= near.mean < 1 and -1e-9 <= near.untrained < 1]
    unique = dict.fromkeys(_normalised(near, depth) for near in valid if is_possible(near, depth))
    return tuple(near for near in unique if near != _normalised(arm, depth))
