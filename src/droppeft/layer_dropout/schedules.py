"""How drop rates change over a run.

Source: rates that grow from 0 are the idea of progressive layer dropping (arXiv:2010.13369), there
with another curve; a last part at full depth is ours.
"""

from collections.abc import Callable, Sequence

from droppeft.errors import DroppeftError

# A point of the run that misses the edge of a part by less than this lies on it.
_ROUNDING = 1e-9


def _constant(progress: float, part: float) -> float:
    return 1.0


def _warm_up(progress: float, part: float) -> float:
    return min(1.0, progress / part)


def _recovery(progress: float, part: float) -> float:
    return 0.0 if 1 - progress <= part + _ROUNDING else 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant,
    "warm_up": _warm_up,
    "recovery": _recovery,
}
"""Schedule by name: (progress, part) to the factor in [0, 1] that multiplies every rate.

``constant``: 1; ``warm_up``: grows linearly from 0 to 1 over the first part of the run;
``recovery``: 1, then 0 in the last part, so that a run ends at the depth of inference.
"""


def scheduled_rates(
    rates: Sequence[float], schedule: str, progress: float, part: float
) -> tuple[float, ...]:
    """Return the drop rates that hold at a point of the run.

    Args:
        rates: the L rates in full.
        schedule: a key of :data:`SCHEDULES`.
        progress: share of the run that has passed, from 0 (nothing) to 1.
        part: the share of the run that ``warm_up`` or ``recovery`` takes, in (0, 1].

    Returns:
        L rates with the same proportions; what is 0 stays 0.

    Raises:
        DroppeftError: an unknown schedule, or a progress or part outside its range.
    """
    check_schedule(schedule, part)
    if not 0 <= progress <= 1:
        raise DroppeftError(f"the progress of the run is {progress}; it must lie between 0 and 1")
    factor = SCHEDULES[schedule](progress, part)
    return tuple(factor * rate for rate in rates)


def check_schedule(schedule: str, part: float) -> None:
    """Refuse what :func:`scheduled_rates` would refuse at any point of the run."""
    if schedule not in SCHEDULES:
        raise DroppeftError(
            f"unknown schedule {schedule!r}; the schedules are {', '.join(SCHEDULES)}"
        )
    if not 0 < part <= 1:
        raise DroppeftError(
            f"the part of the run that {schedule} takes is {part}; it must be above 0 and at most 1"
        )
