"""Tables of the study `statements`: predictions on layer dropout, each beside its control."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.stats import rankdata

from benchmarks.pages.markdown import bare, markdown_table, signed, spread
from benchmarks.pages.studies import (
    REMOVED,
    Runs,
    final_accuracy,
    final_loss,
    gaps,
    outcome_of,
    read_compared,
    runs_of,
    verdict,
)
from droppeft.comparison.study_files import RunRecord

NAME = "statements"
NOTHING = "nothing dropped"
NAMES = {
    "a third, by coins": "a third, independent gates",
    "a third, a draw per turn": "a third, one draw per round",
    "a third, long turns": "a third, 40 steps a round",
    "a third, long turns, a draw per turn": "a third, 40 steps a round, one draw per round",
}
"""Variants whose recorded name uses a word that the documentation does not."""


@dataclass(frozen=True)
class Claim:
    """That one variant ends with a lower loss than another."""

    prediction: str
    text: str
    worse: str
    better: str


CLAIMS = (
    Claim("P1", "a sixth dropped costs", "a sixth", NOTHING),
    Claim("P1", "a third costs more than a sixth", "a third", "a sixth"),
    Claim("P1", "half costs more than a third", "half", "a third"),
    Claim("P4", "full depth at the end helps a sixth", "a sixth", "a sixth, recovery"),
    Claim("P4", "full depth at the end helps a third", "a third", "a third, recovery"),
    Claim("P4", "full depth at the end helps half", "half", "half, recovery"),
    Claim("P5", "one draw per round costs", "a third, a draw per turn", "a third"),
    Claim(
        "P5",
        "one draw per round costs where a round has 40 steps",
        "a third, long turns, a draw per turn",
        "a third, long turns",
    ),
)


def predictions() -> str:
    """What was predicted, the gap of every seed, and whether it holds."""
    runs = runs_of(read_compared(NAME)[1])
    lines = [*_claims(runs), *_recovered(runs), _the_more(runs), *_independent(runs)]
    columns = ("", "prediction", "gap in loss", "gap in points of accuracy", "found")
    return markdown_table(columns, sorted(lines, key=lambda line: line[0]))


def _claims(runs: Runs) -> Iterator[tuple[str, ...]]:
    for claim in CLAIMS:
        worse, better = runs[claim.worse], runs[claim.better]
        found = gaps(worse, better).values()
        points = (100 * one for one in gaps(worse, better, final_accuracy).values())
        yield claim.prediction, claim.text, signed(found), signed(points, 1), verdict(found)


def _recovered(runs: Runs) -> Iterator[tuple[str, ...]]:
    """What part of the gap a last part at full depth closes."""
    for rate in ("a sixth", "a third", "half"):
        gap = gaps(runs[rate], runs[NOTHING])
        won = gaps(runs[rate], runs[f"{rate}, recovery"])
        shares = [won[seed] / gap[seed] for seed in won if gap[seed] > 0]
        shown = ", ".join(f"{one:.0%}" for one in shares)
        text = f"… by more than half of the gap of {rate}: {shown}"
        yield "P4", text, "–", "–", verdict(share - 0.5 for share in shares)


def _the_more(runs: Runs) -> tuple[str, ...]:
    short = gaps(runs["a third, a draw per turn"], runs["a third"])
    long = gaps(runs["a third, long turns, a draw per turn"], runs["a third, long turns"])
    more = [long[seed] - short[seed] for seed in long]
    return "P5", "… the more with 40 steps (difference of gaps)", signed(more), "–", verdict(more)


def _independent(runs: Runs) -> Iterator[tuple[str, ...]]:
    exact, coins = runs["a third"], runs["a third, by coins"]
    found = gaps(coins, exact).values()
    points = (100 * one for one in gaps(coins, exact, final_accuracy).values())
    said = "fails" if verdict(-one for one in found) == "holds" else "not contradicted"
    text = "independent gates are no better than exact counts"
    yield "P6", text, signed(found), signed(points, 1), said
    peaks = gaps(coins, exact, _peak).values()
    text = f"… and their peak is higher: {', '.join(f'{one:+.1f} MB' for one in peaks)}"
    yield "P6", text, "–", "–", verdict(peaks)


def ways_to_drop() -> str:
    """Every variant: accuracy, loss, and what it stores and takes."""
    runs = runs_of(read_compared(NAME)[1])
    lines = []
    for variant, own in runs.items():
        if variant in REMOVED:
            continue
        seconds = fmean(sum(row["round_modelled_s"] for row in one.rows) for one in own.values())
        lines.append(
            (
                NAMES.get(variant, variant),
                spread([final_accuracy(one) for one in own.values()]),
                spread([final_loss(one) for one in own.values()]),
                f"{fmean(map(_least_steps, own.values())):,.0f}",
                f"{max(map(_peak, own.values())):.1f} MB",
                f"{seconds:.1f} s",
            )
        )
    columns = ("dropped", "accuracy", "loss", "least steps", "activations", "run, modelled")
    return markdown_table(columns, lines)


def _peak(run: RunRecord) -> float:
    return float(max(row["activation_bytes_peak"] for row in run.rows)) / 1e6


def _least_steps(run: RunRecord) -> float:
    """Steps of the layer that ran in the fewest, over all clients and rounds."""
    layers = zip(*(row["layer_steps"] for row in run.rows if row["layer_steps"]), strict=True)
    return min(map(sum, layers))


def _mean_dropped(run: RunRecord) -> float:
    layers: int = outcome_of(run)["num_layers"]
    return 1 - fmean(row["mean_active_layers"] for row in run.rows) / layers


def predictors_of_loss() -> str:
    """Rank correlations, and how much more the one says than the other, from the same draws."""
    runs = runs_of(read_compared(NAME)[1])
    dropping = [list(own.values()) for variant, own in runs.items() if variant != NOTHING]

    def means(value: Callable[[RunRecord], float]) -> list[float]:
        return [fmean(map(value, own)) for own in dropping]

    table = np.array([means(_least_steps), means(_mean_dropped), means(final_loss)]).T
    rng = np.random.default_rng(0)
    drawn = np.array([table[rng.integers(0, len(table), len(table))] for _ in range(2000)])
    [whole], parts = _correlations(table[None]), _correlations(drawn)
    names = ("least steps", "mean rate", "how much more the least steps say")
    lines = []
    for name, value, found in zip(names, whole, parts.T, strict=True):
        low, high = np.nanquantile(found, [0.025, 0.975])
        lines.append((name, bare(f"{value:+.2f} ({low:+.2f} to {high:+.2f})")))
    return markdown_table(("", "rank correlation with the final loss"), lines)


def _correlations(tables: np.ndarray) -> np.ndarray:
    """Of least steps, of the mean, and of what the first says more; unknown where all are alike.

    Args:
        tables: (draws, variants, 3).

    Returns:
        (draws, 3).
    """
    ranks = rankdata(tables, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        unit = ranks / np.sqrt(np.square(ranks).sum(axis=1, keepdims=True))
    least, mean = ((unit[..., column] * unit[..., 2]).sum(axis=1) for column in (0, 1))
    found = np.stack([least, mean, np.abs(least) - np.abs(mean)], axis=1)
    return np.where(np.isnan(found).any(axis=1, keepdims=True), np.nan, found)
