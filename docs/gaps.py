"""What two variants of a study are apart, seed by seed, and whether that is as was predicted."""

from collections.abc import Callable, Iterable
from statistics import fmean

from studies import Seeds, bare

from droppeft.comparison.study_files import RunRecord

ENOUGH = 3
"""Seeds without which nothing is said."""


def final_loss(run: RunRecord, last: int | None = None) -> float:
    """Of the global model: mean of the last two evaluations, so that one alone decides nothing.

    Args:
        last: the round after which it is asked for, instead of the run's last one.
    """
    return fmean(_evaluations(run, "global_loss", last)[-2:])


def final_accuracy(run: RunRecord) -> float:
    """Of the global model, over the same evaluations."""
    return fmean(_evaluations(run, "global_accuracy")[-2:])


def gaps(
    one: Seeds, other: Seeds, value: Callable[[RunRecord], float] = final_loss
) -> dict[int, float]:
    """First less second, by the seeds that both have."""
    return {seed: value(one[seed]) - value(other[seed]) for seed in sorted(one.keys() & other)}


def verdict(differences: Iterable[float]) -> str:
    """Whether all seeds are above 0, as was predicted, or below."""
    found = list(differences)
    if len(found) < ENOUGH:
        return "not finished"
    if all(one > 0 for one in found):
        return "holds"
    return "fails" if all(one < 0 for one in found) else "open"


def signed(values: Iterable[float], places: int = 3) -> str:
    """Every one, with its sign."""
    return bare(", ".join(f"{one:+.{places}f}" for one in values)) or "–"


def _evaluations(run: RunRecord, key: str, last: int | None = None) -> list[float]:
    rows = [row for row in run.rows if last is None or row["round"] <= last]
    return [row[key] for row in rows if row[key] is not None]
