"""Schedules: how drop rates change over a run.

Source: rates that grow from 0 are from progressive layer dropping (arXiv:2010.13369), which uses
another curve. Running every layer in the last part of a run is ours.
"""

from collections.abc import Callable, Sequence

from droppeft.errors import DroppeftError

PART = 0.3
"""Share of the run that ``warm_up`` or ``recovery`` takes by default."""

# A point of the run counts as within a part if it is outside by less than this.
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
"""By name, a function from (progress, part) to the factor in [0, 1] that multiplies every rate.

``constant``: always 1. ``warm_up``: grows linearly from 0 to 1 over the first part of the run.
``recovery``: 1, and 0 in the last part, so that every layer runs there, as in inference.
"""


def scheduled_rates(
    rates: Sequence[float], schedule: str, progress: float, part: float
) -> tuple[float, ...]:
    """Return the drop rates at a point of the run.

    Args:
        rates: L drop rates, before the schedule is applied.
        schedule: a key of :data:`SCHEDULES`.
        progress: share of the run that is completed, in [0, 1].
        part: share of the run that ``warm_up`` or ``recovery`` takes, in (0, 1].

    Returns:
        The L rates, each multiplied by the factor of the schedule.

    Raises:
        DroppeftError: if the schedule is unknown, or ``progress`` or ``part`` is out of range.
    """
    check_schedule(schedule, part)
    if not 0 <= progress <= 1:
        raise DroppeftError(f"the progress of the run is {progress}; it must lie between 0 and 1")
    factor = SCHEDULES[schedule](progress, part)
    return tuple(factor * rate for rate in rates)


def check_schedule(schedule: str, part: float) -> None:
    """Raise the errors of :func:`scheduled_rates` that do not depend on the progress."""
    if schedule not in SCHEDULES:
        raise DroppeftError(
            f"unknown schedule {schedule!r}; the schedules are {', '.join(SCHEDULES)}"
        )
    if not 0 < part <= 1:
        raise DroppeftError(
            f"the part of the run that {schedule} takes is {part}; it must be above 0 and at most 1"
        )
