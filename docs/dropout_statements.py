"""The part of the results about statements on layer dropout, each beside its control."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.stats import spearmanr
from studies import Runs, runs_of, seeds_of, spread
from tables import RESULTS, markdown_table, was_compared

from droppeft.comparison.playing import Played
from droppeft.report.page import read_folder

NAME = "statements"
HEAD = """\
## What was predicted of layer dropout, each beside its control

`droppeft compare experiments/statements.toml`: development data (20 Newsgroups), the built-in
model, {devices} devices, {cohort} a round, {rounds} rounds of {steps} steps of {batch} texts,
forwards in bf16, Dirichlet alpha {alpha}, {seeds}. Predictions were written down before
([decision 0010](decisions/0010-convergence.md)). Loss: of the global model, mean of the last two
evaluations; gap: the first's loss less the second's, every seed. A prediction *holds* where all
seeds have its sign, *fails* where all have the other, and is *open* otherwise.
"""
MEMBERS_HEAD = """\

Every member: mean and standard deviation over seeds; *least steps*: those that the layer with the
fewest ran in, over all devices and rounds; activations: the largest peak of a turn (measured);
modelled: the whole run on the devices' profiles.

"""
PREDICTOR_HEAD = """\

What goes with the final loss (P8), over the {count} members that drop layers and have as many
steps: rank correlation with {seeds}, and 95 % intervals by drawing members anew.

"""


@dataclass(frozen=True)
class Claim:
    """That one member ends with a lower loss than another."""

    prediction: str
    text: str
    worse: str
    better: str


CLAIMS = (
    Claim("P1", "a sixth dropped costs", "a sixth", "nothing dropped"),
    Claim("P1", "a third costs more than a sixth", "a third", "a sixth"),
    Claim("P1", "half costs more than a third", "half", "a third"),
    Claim("P4", "recovery helps a sixth", "a sixth", "a sixth, recovery"),
    Claim("P4", "recovery helps a third", "a third", "a third, recovery"),
    Claim("P4", "recovery helps half", "half", "half, recovery"),
    Claim("P5", "a draw per turn costs, 10 steps", "a third, a draw per turn", "a third"),
    Claim(
        "P5",
        "a draw per turn costs, 30 steps",
        "a third, 30 steps, a draw per turn",
        "a third, 30 steps",
    ),
    Claim("P6", "coins cost", "a third, by coins", "a third"),
    Claim(
        "P7",
        "a mean over everyone costs",
        "a third, a draw per turn, over everyone",
        "a third, a draw per turn",
    ),
)
STEPS_ASIDE = "30 steps"
"""Members with more steps are not compared by the steps of their layers."""


def statement_sections() -> list[str]:
    """The section, if the study was made."""
    if not was_compared(NAME):
        return []
    runs = runs_of(read_folder(RESULTS / NAME)[2])
    config = next(iter(runs["nothing dropped"].values())).cell.config
    head = HEAD.format(
        devices=config.devices,
        cohort=config.cohort,
        rounds=config.rounds,
        steps=config.training.local_steps,
        batch=config.training.batch_size,
        alpha=config.partition.alpha,
        seeds=seeds_of(runs),
    )
    return [f"{head}\n{_claims(runs)}{MEMBERS_HEAD}{_members(runs)}{_predictors(runs)}"]


def final_loss(run: Played) -> float:
    """Of the global model: mean of the last two evaluations, so that one alone decides nothing."""
    losses = [row["global_loss"] for row in run.rows if row["global_loss"] is not None]
    return fmean(losses[-2:])


def gaps(
    worse: Mapping[int, Played],
    better: Mapping[int, Played],
    value: Callable[[Played], float] = final_loss,
) -> list[float]:
    """First less second, by seed."""
    return [value(run) - value(better[seed]) for seed, run in worse.items() if seed in better]


def verdict(differences: list[float]) -> str:
    """Whether all seeds have the sign that was predicted."""
    if not differences:
        return "–"
    if all(one > 0 for one in differences):
        return "holds"
    return "fails" if all(one < 0 for one in differences) else "open"


def signed(values: list[float], places: int = 3) -> str:
    """Every one, with its sign."""
    return ", ".join(f"{one:+.{places}f}".replace("0.", ".") for one in values)


def _claims(runs: Runs) -> str:
    lines = []
    for claim in CLAIMS:
        worse, better = runs.get(claim.worse, {}), runs.get(claim.better, {})
        found = gaps(worse, better)
        points = [100 * one for one in gaps(worse, better, _final_accuracy)]
        if found:
            line = (claim.prediction, claim.text, signed(found), signed(points, 1), verdict(found))
            lines.append(line)
    longer = [
        late - early
        for late, early in zip(
            gaps(runs["a third, 30 steps, a draw per turn"], runs["a third, 30 steps"]),
            gaps(runs["a third, a draw per turn"], runs["a third"]),
            strict=False,
        )
    ]
    lines.append(("P5", "… the more with more steps", signed(longer), "–", verdict(longer)))
    return markdown_table(("", "prediction", "gap in loss", "in points of accuracy", ""), lines)


def _final_accuracy(run: Played) -> float:
    found = [row["global_accuracy"] for row in run.rows if row["global_accuracy"] is not None]
    return fmean(found[-2:])


def _members(runs: Runs) -> str:
    lines = []
    for member, own in runs.items():
        peaks = [one.result["activation_bytes_peak"] for one in own.values() if one.result]
        seconds = fmean(sum(row["round_modelled_s"] for row in one.rows) for one in own.values())
        lines.append(
            (
                member,
                spread([_final_accuracy(one) for one in own.values()]),
                spread([final_loss(one) for one in own.values()]),
                f"{fmean(map(_least_steps, own.values())):,.0f}",
                f"{max(peaks) / 1e6:.1f} MB",
                f"{seconds:.1f} s",
            )
        )
    columns = ("member", "accuracy", "loss", "least steps", "activations", "modelled")
    return markdown_table(columns, lines)


def _least_steps(run: Played) -> float:
    layers = zip(*(row["layer_steps"] for row in run.rows), strict=True)
    return min(map(sum, layers))


def _mean_dropped(run: Played) -> float:
    layers = run.result["num_layers"] if run.result else 0
    return 1 - fmean(row["mean_active_layers"] for row in run.rows) / layers


def _predictors(runs: Runs) -> str:
    dropping = {
        member: own
        for member, own in runs.items()
        if member != "nothing dropped" and STEPS_ASIDE not in member
    }
    head = PREDICTOR_HEAD.format(count=len(dropping), seeds="the final loss")
    lines = [
        (name, _correlation(dropping, value))
        for name, value in (("least steps", _least_steps), ("mean dropped", _mean_dropped))
    ]
    return head + markdown_table(("", "with the final loss"), lines)


def _correlation(runs: Runs, value: Callable[[Played], float]) -> str:
    """Of means over seeds, member by member."""
    points = np.array(
        [
            (fmean(map(value, own.values())), fmean(map(final_loss, own.values())))
            for own in runs.values()
        ]
    )
    rng = np.random.default_rng(0)
    drawn = []
    while len(drawn) < 2000:
        again = points[rng.integers(0, len(points), len(points))]
        if min(len(set(again[:, 0])), len(set(again[:, 1]))) > 1:
            drawn.append(spearmanr(again[:, 0], again[:, 1]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{spearmanr(points[:, 0], points[:, 1]).statistic:+.2f} ({low:+.2f} to {high:+.2f})"
