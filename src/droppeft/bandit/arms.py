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
        untrained: share of the layers above the frozen ones, from the lowest, that run and are not
            trained.
    """

    mean: float
    untrained: float

    @property
    def label(self) -> str:
        """Which layers are trained and how many of them are dropped, in words."""
        trained = f"upper {1 - self.untrained:.0%} of the" if self.untrained else "all"
        return f"{trained} layers" + (f", {self.mean:.0%} of them dropped" if self.mean else "")


@dataclass(frozen=True)
class Depth:
    """The layers to which arms apply.

    Attributes:
        layers: number of layers L.
        frozen: number of frozen layers.
        protect_first, protect_last: how many of the first and last trained layers are never
            dropped.
        shape: shape of the drop rates over the trained layers, a key of ``SHAPES``.
    """

    layers: int
    frozen: int
    protect_first: int
    protect_last: int
    shape: str = "uniform"


def candidates(means: Sequence[float], untrained: Sequence[float], depth: Depth) -> tuple[Arm, ...]:
    """All combinations that are possible with the protected layers, without duplicates.

    Raises:
        DroppeftError: if no combination is possible.
    """
    combinations = (
        _whole_layers(Arm(mean, share), depth)
        for share, mean in itertools.product(untrained, means)
    )
    arms = tuple(dict.fromkeys(arm for arm in combinations if _is_possible(arm, depth)))
    if not arms:
        raise DroppeftError(
            f"no arm of the configurator is possible in {depth.layers} layers if the first "
            f"{depth.protect_first} and the last {depth.protect_last} trained layers are "
            "protected; lower configurator.means, or protect fewer"
        )
    return arms


def _whole_layers(arm: Arm, depth: Depth) -> Arm:
    """The arm with ``untrained`` as a share of whole layers, the same for arms that are alike."""
    untrained = first_trained(arm, depth) - depth.frozen
    return Arm(arm.mean, untrained / (depth.layers - depth.frozen))


def _is_possible(arm: Arm, depth: Depth) -> bool:
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
    return (0.0,) * lower + layer_rates(arm.mean, depth.shape, trained, protected=protected)
