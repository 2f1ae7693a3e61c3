"""Arms: what a client drops and trains in one local training, and how many steps it takes. Ours."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import Calibration, layer_rates, protected_ends
from droppeft.layer_dropout.modes import LayerModes, Mode, starts_of

Depths = tuple[float, ...]
"""Fractions of the layers above the frozen ones that a step trains, one drawn for each step."""


@dataclass(frozen=True)
class Arm:
    """What a client does in one local training.

    Attributes:
        mean: mean drop rate over the trained layers; protected layers count with 0.
        depths: how many of the layers above the frozen ones a step trains, as fractions counted
            from the last layer; each step draws one of them. The layers below run forward only.
        steps: the share of the configured local steps that are taken.
    """

    mean: float = 0.0
    depths: Depths = (1.0,)
    steps: float = 1.0

    @property
    def label(self) -> str:
        """Which layers are trained, how many of them are dropped, and in how many steps."""
        return ", ".join(
            (
                _trained(self.depths),
                *([f"{self.mean:.0%} of them dropped"] if self.mean else []),
                *([f"{self.steps:.0%} of the steps"] if self.steps < 1 else []),
            )
        )


def _trained(depths: Depths) -> str:
    if set(depths) == {1.0}:
        return "all layers"
    counts = Counter(f"{depth:.0%}" for depth in sorted(depths, reverse=True))
    percents = [
        percent
        if count == 1 or len(counts) == 1
        else f"{percent} (in {count} of {len(depths)} steps)"
        for percent, count in counts.items()
    ]
    if len(percents) == 1:
        return f"upper {percents[0]} of the layers"
    return f"in each step the upper {', '.join(percents[:-1])} or {percents[-1]} of the layers"


@dataclass(frozen=True)
class Depth:
    """The layers to which arms apply.

    Attributes:
        layers: number of layers L.
        frozen: number of frozen layers.
        protect_first, protect_last: how many of the first and last trained layers are never
            dropped.
        shape: shape of the drop rates over the trained layers, a key of ``SHAPES``.
        calibration: what each of the L layers is worth, which decides the rates instead of the
            shape; ``None`` if it does not.
    """

    layers: int
    frozen: int
    protect_first: int
    protect_last: int
    shape: str = "uniform"
    calibration: Calibration | None = None


def candidates(
    means: Sequence[float], depths: Sequence[Depths], steps: Sequence[float], depth: Depth
) -> tuple[Arm, ...]:
    """All combinations that are possible with the protected layers, without duplicates.

    Raises:
        DroppeftError: if no combination is possible.
    """
    combinations = (
        _whole_layers(Arm(mean, each, share), depth)
        for share, each, mean in itertools.product(steps, depths, means)
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
    """The arm with depths as shares of whole layers, the same for arms that are alike."""
    above = depth.layers - depth.frozen
    times = Counter((depth.layers - start) / above for start in starts_of_arm(arm, depth))
    common = math.gcd(*times.values())  # (1, 1) is drawn like (1,)
    depths = [one for one in sorted(times, reverse=True) for _ in range(times[one] // common)]
    return Arm(arm.mean, tuple(depths), arm.steps)


def _is_possible(arm: Arm, depth: Depth) -> bool:
    """Whether enough layers are unprotected to reach an arm's mean rate."""
    try:
        arm_rates(arm, depth)
    except DroppeftError:
        return False
    return True


def starts_of_arm(arm: Arm, depth: Depth) -> tuple[int, ...]:
    """Candidates for the lowest layer that a step trains, one drawn for each step."""
    return starts_of(arm.depths, depth.layers, depth.frozen)


def first_trained(arm: Arm, depth: Depth) -> int:
    """Index of the first layer that any step trains."""
    return min(starts_of_arm(arm, depth))


def arm_rates(arm: Arm, depth: Depth) -> tuple[float, ...]:
    """Drop rate of each of the L layers; 0 below the first trained layer.

    Raises:
        DroppeftError: if the mean is impossible.
    """
    lower = first_trained(arm, depth)
    trained = depth.layers - lower
    protected = protected_ends(trained, depth.protect_first, depth.protect_last)
    if depth.calibration is None:
        rates = layer_rates(arm.mean, depth.shape, trained, protected=protected)
    else:
        rates = depth.calibration.rates(arm.mean, first=lower, protected=protected)
    return (0.0,) * lower + rates


def steps_of_arm(arm: Arm, local_steps: int) -> int:
    """How many of the configured local steps an arm takes, at least one."""
    return max(1, round(arm.steps * local_steps))


def possible_steps(shares: Sequence[float], local_steps: int) -> tuple[float, ...]:
    """The shares of local steps that whole steps make of these, each once."""
    steps = dict.fromkeys(max(1, round(share * local_steps)) for share in shares)
    return tuple(number / local_steps for number in steps)


def modes_of_arm(arm: Arm, depth: Depth, *, cached: bool = False) -> LayerModes:
    """The distribution over the modes of layers that an arm is.

    Args:
        cached: whether the states of the frozen layers are read instead of computed.
    """
    starts, rates = starts_of_arm(arm, depth), arm_rates(arm, depth)
    return LayerModes(depth.layers, depth.frozen, cached, starts, rates)


def trained_shares(arm: Arm, depth: Depth) -> tuple[float, ...]:
    """For each of the L layers, in which share of an arm's steps it is trained."""
    return modes_of_arm(arm, depth).shares()[Mode.TRAIN]
