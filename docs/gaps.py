"""What two members of a study are apart, seed by seed, and whether that is as was predicted."""

import re
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean

from droppeft.comparison.playing import Played

Seeds = Mapping[int, Played]
"""Runs of a member by seed."""

ENOUGH = 3
"""Seeds without which nothing is said."""


def final_loss(run: Played) -> float:
    """Of the global model: mean of the last two evaluations, so that one alone decides nothing."""
    return fmean(_evaluations(run, "global_loss")[-2:])


def final_accuracy(run: Played) -> float:
    """Of the global model, over the same evaluations."""
    return fmean(_evaluations(run, "global_accuracy")[-2:])


def gaps(
    one: Seeds, other: Seeds, value: Callable[[Played], float] = final_loss
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


def bare(text: str) -> str:
    """Numbers below one without their 0."""
    return re.sub(r"(?<![0-9])0\.(?=[0-9])", ".", text)


def _evaluations(run: Played, key: str) -> list[float]:
    return [row[key] for row in run.rows if row[key] is not None]
