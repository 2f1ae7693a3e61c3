"""Arms: what a client may be told to drop and to train. Ours."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import SHAPES, protected_ends, weighted_rates

IMPORTANCE = "importance"
"""The shape that drops what matters least: rates in inverse proportion to a layer's importance."""


LEAST_PART = 1e-9
"""Of the largest importance: below it a layer's is not known."""


@dataclass(frozen=True)
class Arm:
    """What a client does in one turn.

    Attributes:
        mean: drop rate, mean over the layers that are trained; protected ones count 0.
        shape: of the rates over those layers, a name of ``SHAPES`` or :data:`IMPORTANCE`.
        untrained: share of the layers, from the first, that run and are not trained.
    """

    mean: float
    shape: str
    untrained: float

    @property
    def label(self) -> str:
        """For people."""
        untrained = f", first {self.untrained:.0%} not trained" if self.untrained else ""
        if not self.mean:
            return f"nothing dropped{untrained}"
        shape = "" if self.shape == "uniform" else f" ({self.shape})"
        return f"{self.mean:.0%} dropped{shape}{untrained}"


@dataclass(frozen=True)
class Depth:
    """The layers that arms are about.

    Attributes:
        layers: L.
        frozen: so many of the first have no adapter, for the whole run.
        protect_first, protect_last: of the trained layers, never dropped.
    """

    layers: int
    frozen: int
    protect_first: int
    protect_last: int


def candidates(
    means: Sequence[float], shapes: Sequence[str], untrained: Sequence[float], depth: Depth
) -> tuple[Arm, ...]:
    """All combinations that the protected layers allow, each once.

    Raises:
        DroppeftError: none is possible.
    """
    every = (
        _plain(Arm(mean, shape, untrained), depth)
        for untrained, mean, shape in itertools.product(untrained, means, shapes)
    )
    found = tuple(dict.fromkeys(arm for arm in every if is_possible(arm, depth)))
    if not found:
        raise DroppeftError(
            f"no arm of the configurator is possible in {depth.layers} layers with "
            f"{depth.protect_first} first and {depth.protect_last} last of the trained ones "
            "protected; lower configurator.means, or protect fewer"
        )
    return found


def _plain(arm: Arm, depth: Depth) -> Arm:
    """Equal behaviour under one name: nothing dropped has no shape, a untrained whole layers."""
    trainable = depth.layers - depth.frozen
    untrained = (first_trained(arm, depth) - depth.frozen) / trainable
    return Arm(arm.mean, arm.shape if arm.mean else "uniform", untrained)


def is_possible(arm: Arm, depth: Depth) -> bool:
    """Whether the protected layers leave enough to drop, and something is trained."""
    try:
        arm_rates(arm, depth, None)
    except DroppeftError:
        return False
    return True


def first_trained(arm: Arm, depth: Depth) -> int:
    """Index of the first layer that is trained."""
    return depth.frozen + round(arm.untrained * (depth.layers - depth.frozen))


def arm_rates(arm: Arm, depth: Depth, importance: Sequence[float] | None) -> tuple[float, ...]:
    """Drop rate of each of the L layers; 0 before the first that is trained.

    Args:
        importance: of each layer, as far as it is known; for :data:`IMPORTANCE`, which is
            ``uniform`` until then.

    Raises:
        DroppeftError: the mean is impossible, or no layer is trained.
    """
    lower = first_trained(arm, depth)
    trained = depth.layers - lower
    if trained < 1:
        raise DroppeftError("an arm that trains no layer")
    protected = protected_ends(trained, depth.protect_first, depth.protect_last)
    weights = _weights(arm.shape, trained, importance[lower:] if importance else None)
    return (0.0,) * lower + weighted_rates(arm.mean, weights, protected=protected)


def _weights(shape: str, layers: int, importance: Sequence[float] | None) -> Sequence[float]:
    if shape != IMPORTANCE:
        return SHAPES[shape](layers)
    if importance is None or min(importance) <= LEAST_PART * max(importance):
        return (1.0,) * layers
    return tuple(1 / each for each in importance)


def neighbours(
    arm: Arm, step: float, shapes: Sequence[str], depth: Depth, *, several_depths: bool = True
) -> tuple[Arm, ...]:
    """Arms that differ in one thing: a little more or less dropped, another shape, one layer more
    or less trained.

    Args:
        step: of the mean.
        shapes: that there may be.
        several_depths: whether the share of untrained layers may change.
    """
    layer = 1 / (depth.layers - depth.frozen)
    near = [
        *(replace(arm, mean=round(arm.mean + change, 6)) for change in (-step, step)),
        *(replace(arm, shape=shape) for shape in shapes),
        *(
            replace(arm, untrained=arm.untrained + change)
            for change in (-layer, layer)
            if several_depths
        ),
    ]
    inside = [one for one in near if 0 <= one.mean < 1 and -1e-9 <= one.untrained < 1]
    found = dict.fromkeys(_plain(one, depth) for one in inside if is_possible(one, depth))
    return tuple(one for one in found if one != _plain(arm, depth))
