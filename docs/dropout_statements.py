"""The part of the results about statements on layer dropout, each beside its control."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from gaps import final_accuracy, final_loss, gaps, signed, verdict
from scipy.stats import spearmanr
from studies import Runs, bare, outcome_of, runs_of, shown_settings, spread
from tables import markdown_table, read_compared, was_compared

from droppeft.comparison.study_files import RunRecord

NAME = "statements"
NOTHING = "nothing dropped"
HEAD = """\
## What was predicted of layer dropout, each beside its control

`droppeft compare benchmarks/statements/study.toml`: development data (20 Newsgroups), the built-in
model, {clients} clients, {cohort} a round, {rounds} rounds of {steps} steps of {batch} texts
(*long turns*: 4 of 40), forwards in bf16, learning rates that fall to 0, Dirichlet alpha {alpha},
{seeds}. The last layer is never dropped: half are three of the other five. Predictions were
written down before ([decision 0010](decisions/0010-convergence.md)). A *turn* is a client's local
training in a round. Gap: loss of the global model of the variant that should be worse less that of
the other, mean of the last two evaluations, every seed: + is as predicted in loss, and - in points
of accuracy. *Holds*: all seeds are as predicted; *fails*: all are not; *open* otherwise. A line in
which nothing differed would hold by chance one time in eight. Recovery opens all gates in the last
quarter of the rounds, at a quarter of the peak learning rate and less: equal steps, more work, and
the peak of full depth.
"""
VARIANTS_HEAD = """\

Every variant: mean and standard deviation over seeds; *least steps*: those that the layer with the
fewest ran in, over all clients and rounds; activations: the largest peak of a local training
(measured); modelled: the whole run on the clients' profiles.

"""
PREDICTOR_HEAD = """\

What correlates with the final loss (P8), over the {count} variants that drop layers: rank
correlations of means over seeds, and 95 % intervals by resampling variants. Most of these variants
have nearly the same mean rate, which the mean cannot tell apart: the difference shows little.

"""


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
    Claim("P4", "recovery helps a sixth", "a sixth", "a sixth, recovery"),
    Claim("P4", "recovery helps a third", "a third", "a third, recovery"),
    Claim("P4", "recovery helps half", "half", "half, recovery"),
    Claim("P5", "a draw per turn costs", "a third, a draw per turn", "a third"),
    Claim(
        "P5",
        "… also where a mean over everyone moves layers no further",
        "a third, a draw per turn, over everyone",
        "a third",
    ),
    Claim(
        "P5",
        "a draw per turn costs in long turns",
        "a third, long turns, a draw per turn",
        "a third, long turns",
    ),
    Claim(
        "P7",
        "a mean over everyone costs",
        "a third, a draw per turn, over everyone",
        "a third, a draw per turn",
    ),
)
COLUMNS = ("", "prediction", "gap in loss", "in points of accuracy", "found")


def statement_sections() -> list[str]:
    """The section, if the study was made."""
    if not was_compared(NAME):
        return []
    runs = runs_of(read_compared(NAME)[1])
    head = HEAD.format(**shown_settings(runs))
    lines = [*_claims(runs), *_recovered(runs), _the_more(runs), *_coins(runs)]
    table = markdown_table(COLUMNS, sorted(lines, key=lambda line: line[0]))
    return [f"{head}\n{table}{VARIANTS_HEAD}{_variants(runs)}{_predictors(runs)}"]


def _claims(runs: Runs) -> Iterator[tuple[str, ...]]:
    for claim in CLAIMS:
        worse, better = runs.get(claim.worse, {}), runs.get(claim.better, {})
        found = gaps(worse, better).values()
        points = (100 * one for one in gaps(worse, better, final_accuracy).values())
        yield claim.prediction, claim.text, signed(found), signed(points, 1), verdict(found)


def _recovered(runs: Runs) -> Iterator[tuple[str, ...]]:
    """What part of the gap recovery closes; nothing is said where there is none."""
    for rate in ("a sixth", "a third", "half"):
        gap = gaps(runs.get(rate, {}), runs.get(NOTHING, {}))
        won = gaps(runs.get(rate, {}), runs.get(f"{rate}, recovery", {}))
        shares = {seed: won[seed] / gap[seed] for seed in won if seed in gap and gap[seed] > 0}
        shown = ", ".join(f"{one:.0%}" for one in shares.values())
        text = f"… by more than half of the gap of {rate}: {shown}"
        yield "P4", text, "–", "–", verdict(share - 0.5 for share in shares.values())


def _the_more(runs: Runs) -> tuple[str, ...]:
    short = gaps(runs.get("a third, a draw per turn", {}), runs.get("a third", {}))
    long = gaps(
        runs.get("a third, long turns, a draw per turn", {}), runs.get("a third, long turns", {})
    )
    more = [long[seed] - short[seed] for seed in long if seed in short]
    return "P5", "… the more in long turns (the gaps' difference)", signed(more), "–", verdict(more)


def _coins(runs: Runs) -> Iterator[tuple[str, ...]]:
    exact, coins = runs.get("a third", {}), runs.get("a third, by coins", {})
    found = gaps(coins, exact).values()
    points = (100 * one for one in gaps(coins, exact, final_accuracy).values())
    better = verdict(-one for one in found)
    said = {"holds": "fails", "not finished": "not finished"}.get(better, "not contradicted")
    yield "P6", "coins are no better than exact counts", signed(found), signed(points, 1), said
    peaks = gaps(coins, exact, _peak).values()
    text = f"… and their peak is higher: {', '.join(f'{one:+.1f} MB' for one in peaks)}"
    yield "P6", text, "–", "–", verdict(peaks)


def _variants(runs: Runs) -> str:
    lines = []
    for variant, own in runs.items():
        seconds = fmean(sum(row["round_modelled_s"] for row in one.rows) for one in own.values())
        lines.append(
            (
                variant,
                spread([final_accuracy(one) for one in own.values()]),
                spread([final_loss(one) for one in own.values()]),
                f"{fmean(map(_least_steps, own.values())):,.0f}",
                f"{max(map(_peak, own.values())):.1f} MB",
                f"{seconds:.1f} s",
            )
        )
    columns = ("variant", "accuracy", "loss", "least steps", "activations", "modelled")
    return markdown_table(columns, lines)


def _peak(run: RunRecord) -> float:
    return float(max(row["activation_bytes_peak"] for row in run.rows)) / 1e6


def _least_steps(run: RunRecord) -> float:
    layers = zip(*(row["layer_steps"] for row in run.rows if row["layer_steps"]), strict=True)
    return min(map(sum, layers))


def _mean_dropped(run: RunRecord) -> float:
    layers: int = outcome_of(run)["num_layers"]
    return 1 - fmean(row["mean_active_layers"] for row in run.rows) / layers


def _predictors(runs: Runs) -> str:
    """Rank correlations, and how much more the one says than the other, from the same draws."""
    dropping = [list(own.values()) for variant, own in runs.items() if variant != NOTHING]
    if len(dropping) < 4:
        return ""

    def means(value: Callable[[RunRecord], float]) -> list[float]:
        return [fmean(map(value, own)) for own in dropping]

    table = np.array([means(_least_steps), means(_mean_dropped), means(final_loss)]).T
    rng = np.random.default_rng(0)
    drawn = [table[rng.integers(0, len(table), len(table))] for _ in range(2000)]
    whole, parts = _correlations(table), np.array([_correlations(one) for one in drawn])
    names = ("least steps", "mean dropped", "how much more the least steps say")
    lines = []
    for name, value, found in zip(names, whole, parts.T, strict=True):
        low, high = np.nanquantile(found, [0.025, 0.975])
        lines.append((name, bare(f"{value:+.2f} ({low:+.2f} to {high:+.2f})")))
    head = PREDICTOR_HEAD.format(count=len(dropping))
    return head + markdown_table(("", "with the final loss"), lines)


def _correlations(table: np.ndarray) -> tuple[float, float, float]:
    """Of least steps, of the mean, and of what the first says more; unknown where all are alike."""
    if any(len(set(column)) < 2 for column in table.T):
        return (float("nan"),) * 3
    least, mean = (float(spearmanr(table[:, one], table[:, 2]).statistic) for one in (0, 1))
    return least, mean, abs(least) - abs(mean)
