"""Arms: drop rates and untrained layers that a client may be given. Ours."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import layer_rates, protected_ends


@dataclass(frozen=True)
class Arm:
    """What a client drops and trains in one local training.

    Attributes:
        mean: mean drop rate over the trained layers; protected layers count with 0.
        shape: shape of the rates over these layers, a key of ``SHAPES``.
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
        arm_rates(arm, depth)
    except DroppeftError:
        return False
    return True


def first_trained(arm: Arm, depth: Depth) -> int:
    """Index of the first layer that is trained."""
    return depth.frozen + round(arm.untrained * (depth.layers - depth.frozen))


def arm_rates(arm: Arm, depth: Depth) -> tuple[float, ...]:
    """Drop rate of each of the L layers; 0 below the first trained layer.

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
    return (0.0,) * lower + layer_rates(arm.mean, arm.shape, trained, protected=protected)
