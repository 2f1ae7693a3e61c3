"""The page about convergence: what was assumed, and what the data say of it.

``python docs/convergence_page.py`` draws its figure from the result file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dropout_statements import final_loss, gaps, signed, verdict
from studies import Runs, runs_of, seeds_of
from tables import NOTICE, RESULTS, markdown_table, was_compared

from droppeft.comparison.playing import Played
from droppeft.report.drawing import COLOURS, LINES, MARKERS, style
from droppeft.report.page import read_folder

NAME = "convergence"
FIGURE = Path(__file__).parent / "figures" / "convergence.png"

THEORY = """\
# What layer dropout converges to

Assumptions, an elementary argument (ours), what it predicts, and what the data support. The
predictions were written down before anything was run ([decision
0010](decisions/0010-convergence.md)).

## Setting and assumptions

Device *i* has the loss Fᵢ(A; g): A are the adapters and the head, g the gates of one mini-batch,
which close layer *l* with probability pₗ. Judged is F(A), the mean over devices of Fᵢ(A; 1): all
layers open. Assumed are: every Fᵢ(·; g) has a Lipschitz gradient; a step's gradient has variance
σ² by its texts and σ_g²(p) by its gates, and σ_g(0) = 0; devices' gradients of the gated loss
differ by at most ζ; cohorts are drawn uniformly; the server takes the plain mean of what was
trained by SGD.

## The argument

A step follows an unbiased estimate of the gradient of the **gated loss** F̃(A) = E_g F(A; g), not
of F. So the usual bounds for federated averaging with partial participation hold for F̃, with σ² +
σ_g²(p) in the place of σ²: what is in them vanishes with rounds, or is scaled by cohort, local
steps and skew. For F itself they leave a floor,

> ‖∇F‖² ≤ 2 ‖∇F̃‖² + 2 B(p)², where B(p) is the largest ‖∇F − ∇F̃‖ and B(0) = 0.

B knows nothing of rounds, cohort, local steps or skew, so that none of these takes it away.
Opening all gates for a last part does, since it makes F̃ = F.

**Beside the published bound.** Zhou et al. (*Every Parameter Matters*, arXiv:2310.08670) mask
weights by device and round. Their floor is made of *model reduction noise*, how much a mask takes
away, over the *minimum coverage index*, how many devices train the parameter that the fewest
train. Gates drawn per mini-batch leave a layer untrained for a device's whole turn of K steps only
with probability pₗᴷ (half dropped, 5 steps: 3 %): coverage is nearly the cohort, and reduction
noise is what remains. With one draw per turn, as in FedRA, M (1 − pₗ) devices of M cover a layer
on average, and none with probability pₗᴹ.

**Where droppeft leaves the assumptions**: AdamW with clipped gradients, a mean weighted by rows,
low-rank adapters, and devices whose test rows are not those of the global test set. The bounds are
a guide to what to measure, and no guarantee.
"""
STUDY = """\
## Drop rate, local steps, skew and cohort

`droppeft compare experiments/convergence.toml`: development data (20 Newsgroups), the built-in
model, {devices} devices, {rounds} rounds of {batch} texts a step, constant learning rates,
forwards in bf16, {seeds}. Gap: the global model's loss less that of nothing dropped on the same
seed, mean of the last two evaluations, every seed.

![Loss against rounds by drop rate](figures/convergence.png)

"""
FACTORS_HEAD = """\

What each factor does to the gap of half dropped, mean over the others; the rate's own line is from
none to half. P3 says that the others do less than the rate.

"""
LONG_HEAD = """\

Three times as many rounds (20 steps, alpha 10, 2 devices a round): the gap at a round and the one
before that was evaluated. P2 says that it does not close.

"""
RATES = ("none", "a third", "half")


@dataclass(frozen=True)
class Setting:
    """What a run has beside its rate."""

    steps: int
    alpha: float
    cohort: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.steps} steps, alpha {self.alpha:g}, {self.cohort} a round"


Found = Mapping[Setting, Mapping[str, Mapping[int, Played]]]
"""Runs by seed, rate and setting."""


def convergence_page() -> str:
    """The argument, and if it was made the study."""
    page = f"{NOTICE}\n\n{THEORY}"
    if not was_compared(NAME):
        return page
    runs, found = _read()
    config = next(iter(next(iter(runs.values())).values())).cell.config
    head = STUDY.format(
        devices=config.devices,
        rounds=min(setting.rounds for setting in found),
        batch=config.training.batch_size,
        seeds=seeds_of(runs),
    )
    grid, long = _grid(found), _long(found)
    return "\n".join(
        [page, head + _gap_table(grid), *([FACTORS_HEAD + _factors(grid)]), LONG_HEAD + long]
    )


def _read() -> tuple[Runs, Found]:
    runs = runs_of(read_folder(RESULTS / NAME)[2])
    found: dict[Setting, dict[str, Mapping[int, Played]]] = {}
    for member, own in runs.items():
        config = next(iter(own.values())).cell.config
        setting = Setting(
            int(config.training.local_steps or 0),
            float(config.partition.alpha),
            config.cohort,
            config.rounds,
        )
        found.setdefault(setting, {})[member.partition(" dropped")[0]] = own
    return runs, found


def _grid(found: Found) -> Found:
    shortest = min(setting.rounds for setting in found)
    return {setting: own for setting, own in found.items() if setting.rounds == shortest}


def _gap_table(grid: Found) -> str:
    lines = []
    for setting, own in grid.items():
        none, third, half = (own.get(rate, {}) for rate in RATES)
        if not (none and third and half):
            continue
        small, large, more = gaps(third, none), gaps(half, none), gaps(half, third)
        lines.append(
            (
                str(setting),
                f"{fmean(map(final_loss, none.values())):.3f}",
                f"{signed(small)} ({verdict(small)})",
                f"{signed(large)} ({verdict(large)})",
                verdict(more),
            )
        )
    columns = ("setting", "loss, none dropped", "gap, a third", "gap, half", "half over a third")
    return markdown_table(columns, lines)


def _factors(grid: Found) -> str:
    by_setting = {
        setting: fmean(gaps(own["half"], own["none"]))
        for setting, own in grid.items()
        if {"half", "none"} <= own.keys()
    }
    lines = [("rate", "none", "half", "0", _mean(list(by_setting.values())), "–")]
    for name in ("steps", "alpha", "cohort"):
        low, high = sorted({getattr(setting, name) for setting in by_setting})
        means = [
            fmean(gap for setting, gap in by_setting.items() if getattr(setting, name) == level)
            for level in (low, high)
        ]
        lines.append(
            (
                name,
                f"{low:g}",
                f"{high:g}",
                *(f"{one:.3f}" for one in means),
                _mean([means[1] - means[0]]),
            )
        )
    return markdown_table(("factor", "from", "to", "gap", "gap then", "change"), lines)


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):+.3f}"


def _long(found: Found) -> str:
    longest = max(found, key=lambda setting: setting.rounds)
    own = found[longest]
    lines = []
    for rate in RATES[1:]:
        for last in range(longest.rounds // 6, longest.rounds + 1, longest.rounds // 6):
            here = gaps(own[rate], own["none"], lambda run, last=last: _loss_by(run, last))
            lines.append((f"{rate} dropped", str(last), signed(here), verdict(here)))
    return markdown_table(("rate", "round", "gap", "above none dropped"), lines)


def _loss_by(run: Played, last: int) -> float:
    """Mean of the two evaluations up to a round."""
    losses = [
        row["global_loss"]
        for row in run.rows
        if row["global_loss"] is not None and row["round"] <= last
    ]
    return fmean(losses[-2:])


def draw() -> None:
    """Loss against rounds: a panel per setting, a line per rate, seeds as a band."""
    from matplotlib.figure import Figure

    _, found = _read()
    grid = _grid(found)
    longest = max(found, key=lambda setting: setting.rounds)
    with style():
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        rows = figure.subplots(3, 4, gridspec_kw={"height_ratios": (1, 1, 1.2)})
        for axes, setting in zip(rows[:2].flat, grid, strict=False):
            _panel(axes, grid[setting], f"{setting}")
        for axes in rows[2]:
            axes.remove()
        wide = figure.add_subplot(rows[2][0].get_gridspec()[2, :])
        _panel(wide, found[longest], f"{longest}, {longest.rounds} rounds")
        handles, labels = wide.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        figure.supxlabel("round")
        figure.supylabel("loss of the global model (mean and range of seeds)")
        FIGURE.parent.mkdir(exist_ok=True)
        figure.savefig(FIGURE, dpi=130)


def _panel(axes: Any, own: Mapping[str, Mapping[int, Played]], title: str) -> None:
    axes.set_title(title, fontsize=9.5)
    axes.grid(axis="y")
    for index, rate in enumerate(RATES):
        curves: dict[int, list[float]] = {}
        for run in own.get(rate, {}).values():
            for row in run.rows:
                if row["global_loss"] is not None:
                    curves.setdefault(row["round"], []).append(row["global_loss"])
        rounds = sorted(curves)
        axes.plot(
            rounds,
            [fmean(curves[one]) for one in rounds],
            color=COLOURS[index],
            marker=MARKERS[index],
            linestyle=LINES[index],
            markersize=4,
            label=f"{rate} dropped",
        )
        axes.fill_between(
            rounds,
            [min(curves[one]) for one in rounds],
            [max(curves[one]) for one in rounds],
            color=COLOURS[index],
            alpha=0.15,
            linewidth=0,
        )


if __name__ == "__main__":
    draw()
