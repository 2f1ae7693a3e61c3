"""The page about convergence: what was assumed, and what the data say of it.

``python docs/convergence_page.py`` draws its figure from the result file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from gaps import final_loss, gaps, signed, verdict
from studies import Runs, Seeds, bare, outcome_of, runs_of, seeds_of
from tables import FIGURES, NOTICE, markdown_table, read_compared, was_compared

from droppeft.comparison.study_files import Study
from droppeft.report.drawing import looks, style

NAME = "convergence"
FIGURE = FIGURES / "convergence.png"

THEORY = """\
# What layer dropout converges to

This page states assumptions, an elementary argument (ours), what it leads to expect, and what the
data support. The predictions were written down before these two studies were run ([decision
0010](decisions/0010-convergence.md)). Earlier runs on one client ([findings](findings.md)) had
already shown P1, P4 and P6, and no effect of a draw per local training: in a federation these are
repetitions rather than predictions.

## Setting and assumptions

Client *i* has the loss Fᵢ(A; g): A are the adapters and the head, g the gates of one mini-batch,
which close layer *l* with probability pₗ (0 where it is protected). The model is judged by F(A),
the mean over clients of Fᵢ(A; 1), with all layers open. The assumptions are:

- every Fᵢ(·; g) has a Lipschitz gradient in the region that training reaches;
- gates are drawn independently of the texts, between steps and between clients (with exact counts
  layers depend on each other within a step, which changes the numbers and not the argument);
- a step's gradient has variance σ² by its texts, for every g, and σ_g² by its gates, which is 0
  when nothing is dropped;
- clients' gradients of the gated loss differ by at most ζ, cohorts are drawn uniformly, and the
  server takes the plain mean of what was trained by SGD.

## The argument

With gates drawn afresh in every step, a step on client *i* follows an unbiased estimate of the
gradient of its **gated loss** F̃ᵢ(A) = E_g Fᵢ(A; g), not of Fᵢ(A; 1). So the known bounds for
federated averaging with partial participation hold for F̃, the mean of these, with σ² + σ_g² in the
place of σ². With a step size that falls with the number of rounds, their terms vanish. With a
constant one a part stays that grows with σ² + σ_g² and falls with the cohort.

Where ∇F̃ = 0, ‖∇F‖ *is* ‖∇F − ∇F̃‖: unless the two gradients vanish together, training ends where F
still falls. In general ‖∇F‖² ≤ 2 ‖∇F̃‖² + 2 B², B being the largest distance of the two gradients
in the region that training reaches; it depends on how gates are drawn, jointly, and is 0 when
nothing is dropped. B knows nothing of rounds, cohort, local steps or skew. That it grows with the
rate, and that it shows in the loss, the argument does not say: P1 to P3 are expectations from it,
not consequences. Opening all gates for a last part makes F̃ = F; what is then left shrinks as in
any training that begins there, given enough rounds and step size (P4).

With one draw per local training this fails: all K steps follow the same gates, so that gate
noise is not averaged over K and acts like a difference between clients, which is why P5 expects a
loss that grows with K.

**Beside the published bound.** Zhou et al. (*Every Parameter Matters*, arXiv:2310.08670) mask
weights by client and round, and prove convergence to a stationary point under conditions. Their
analysis turns on *model reduction noise*, how much a mask takes away, and on the *minimum coverage
index*, how many clients train the parameter that the fewest train. That noise is of masked trained
weights; a closed gate bypasses frozen weights too, so that only the roles compare: their noise with
our B. With a draw per mini-batch a layer is not trained at all in a local training with probability
pₗᴷ (half dropped, 10 steps: once in a thousand). With one draw per local training a layer
has M (1 − pₗ) clients on average and none with probability pₗᴹ (half dropped, 2 clients: one round
in four); the *least covered* of several layers fares worse. (We used that paper's abstract and what
we remember of it, not its proofs.)

**Where droppeft departs from the assumptions**: AdamW, whose moments start afresh in each local
training, with clipped gradients and weight decay; batches drawn without replacement; a mean
weighted by rows (nearly equal here) over the clients that ran a layer at least once, which with
one draw per local training moves a layer further in a round than a mean over all, by up to 1/(1 −
pₗ): the argument says nothing of P7; the modules' own dropout (.1) in training and not in
evaluation, for all variants alike; and a loss measured on test texts of all classes: gates may
regularise, so that a gap may be negative without contradicting any of this. The bounds are a guide
to what to measure, and no guarantee.
"""
NOT_YET = """\
## What the data support

Nothing yet: `droppeft compare benchmarks/convergence/study.toml` has not been run.
"""
STUDY = """\
## Drop rate, local steps, skew and cohort

`droppeft compare benchmarks/convergence/study.toml`: development data (20 Newsgroups), the built-in
model, {clients} clients, {total} steps per client over all rounds, in {some} rounds or in
{many}, {batch} texts a step, constant learning rates, forwards in bf16, {seeds}; the loss is on
{sample} test texts. Gap: the global model's loss less that of nothing dropped on the same seed,
mean of the last two evaluations (the last quarter of the run), every seed. *Holds*: all seeds above
0; *fails*: all below; *open* otherwise. If nothing differed, a line would hold by chance one time
in eight; there are many lines, and those that share runs are not independent.

![Loss against rounds by drop rate](figures/convergence.png)

"""
FACTORS_HEAD = """\

What each factor changes in the gap, by seed, mean over the other factors, and the range over these
of its mean over seeds; the rate's own line is the gap itself. P3 expects the
others to change less than the rate does. How large a change is depends on the levels chosen, and a
mean near 0 may hide changes of both signs.

"""
COVERAGE_HEAD = """\

The two quantities of the published bound, as far as they were recorded: of a round's clients, the
share that trained the layer that the fewest trained (*coverage*; mean over rounds, and the least of
any round), and of the steps that layers could have had, what the layer with the fewest had. What a
closed gate takes from the gradient (*reduction noise*) was not recorded; it grows with the rate and
depends on nothing else here.

"""
LONG_HEAD = """\

Three times as many rounds ({setting}), with a constant and with a falling learning rate: the gap
after a round, mean of it and the evaluation before. Share left: the gap at the end through that
after a third of the rounds. P2 (it does not close) *holds* where at least half is left on every
seed, *fails* where less is left on every seed, and is *open* otherwise, also where there is no
gap.

"""
SUPPORT = """\

## What the data support

With half dropped training has barely begun in {steps} steps: it ends near or above the loss it
began with, so that its gap there is mostly what the others have learnt. What follows is said of a
third dropped, and of half in the long runs.

- **P1 holds**: with a third dropped the loss is higher on every seed of seven settings of eight,
  and with half dropped higher than with a third in six. The others have two clients a round with
  alpha .1, where nobody gets far.
- **P2 holds**, on every seed, for both rates and both schedules: with three times as many rounds at
  least seven tenths of the gap are left. With the constant rate a third dropped is level from half
  of the run on ({level}), while nothing dropped still falls ({plain_level}): the gap does not
  close. Half dropped still falls with the falling rate, so that its gap may be slowness.
- **P3 holds** of a third dropped: on every seed each factor changes the gap by less than the rate
  does, by half of it at most. Of half dropped it cannot be said here.
- **It is not coverage.** All clients of nearly all rounds trained every layer; in the published
  bound that leaves its other part, reduction noise, which grows with the rate.
- **Noise of the gates** (σ_g²) would shrink with a falling learning rate, and with the cohort: as
  much of the gap is left with the falling rate, and where clients are alike three times the cohort
  changes the mean gap of a third dropped by less than a tenth (by seed by up to a quarter, either
  way).
- **It is not that a layer had fewer steps.** After {long} rounds with a third dropped the layer
  with the fewest has had {more:.1f} times the steps that it had in {short} rounds with nothing
  dropped, and the loss is {dropped:.2f} (constant rate), where that was {plain:.2f}. With half
  dropped: {half_more:.1f} times, and {half:.2f}. (Means of the last two evaluations; after round
  {short} itself it was {plain_end:.2f}.)
- What is left is what the argument calls B: that training with layers left out settles on another
  loss than the one that is judged. It was not measured itself. One data set, one model, AdamW,
  {long} rounds; the argument's assumptions are not all met.
"""
RATES = ("none", "a third", "half")
FACTORS = ("steps", "alpha", "cohort")


@dataclass(frozen=True)
class Setting:
    """What a run has beside its rate."""

    steps: int
    alpha: float
    cohort: int
    rounds: int
    schedule: str

    def __str__(self) -> str:
        return f"{self.steps} steps, alpha {self.alpha:g}, {self.cohort} a round"


Found = Mapping[Setting, Mapping[str, Seeds]]
"""Runs by setting, rate and seed."""


def convergence_page() -> str:
    """The argument, and if it was made the study."""
    page = f"{NOTICE}\n\n{THEORY}"
    if not was_compared(NAME):
        return f"{page}\n{NOT_YET}"
    study, runs, found = _read()
    grid, long = _parted(found)
    known = outcome_of(next(iter(next(iter(runs.values())).values())))
    rounds = sorted({setting.rounds for setting in grid})
    steps = known["rounds"] * known["local_steps"]
    head = STUDY.format(
        clients=known["clients"],
        total=steps,
        some=rounds[0],
        many=rounds[-1],
        batch=known["batch_size"],
        seeds=seeds_of(runs),
        sample=known["evaluation_rows"],
    )
    tables = f"{_gap_table(grid)}{_factors(grid)}{_coverage(grid)}{_long(long)}"
    finished = all({*runs.get(one, {})} == {*study.seeds} for one in study.variants)
    return f"{page}\n{head}{tables}{_support(long, steps) if finished else ''}"


def _read() -> tuple[Study, Runs, Found]:
    study, records = read_compared(NAME)
    runs = runs_of(records)
    found: dict[Setting, dict[str, Seeds]] = {}
    for variant, own in runs.items():
        known = outcome_of(next(iter(own.values())))
        names = ("local_steps", "alpha", "cohort_size", "rounds", "schedule")
        setting = Setting(*(known[name] for name in names))
        found.setdefault(setting, {})[variant.partition(" dropped")[0]] = own
    return (
        study,
        runs,
        {setting: {rate: own.get(rate, {}) for rate in RATES} for setting, own in found.items()},
    )


def _parted(found: Found) -> tuple[Found, Found]:
    """The grid, whose runs have equally many steps, and the longer ones."""
    shortest = min(setting.steps * setting.rounds for setting in found)
    grid = {s: own for s, own in found.items() if s.steps * s.rounds == shortest}
    return grid, {s: own for s, own in found.items() if s not in grid}


def _gap_table(grid: Found) -> str:
    lines = []
    for setting, own in grid.items():
        none, third, half = (own[rate] for rate in RATES)
        small, large, more = (
            gaps(one, other).values() for one, other in ((third, none), (half, none), (half, third))
        )
        lines.append(
            (
                str(setting),
                bare(f"{fmean(map(final_loss, none.values())):.3f}") if none else "–",
                f"{signed(small)}: {verdict(small)}",
                f"{signed(large)}: {verdict(large)}",
                verdict(more),
            )
        )
    columns = ("setting", "loss, none dropped", "gap, a third", "gap, half", "half over a third")
    return markdown_table(columns, lines)


def _factors(grid: Found) -> str:
    lines = [line for rate in RATES[1:] for line in _changes(grid, rate)]
    columns = ("of", "factor", "from", "to", "change of the gap", "range over the others")
    return FACTORS_HEAD + markdown_table(columns, lines) if lines else ""


def _changes(grid: Found, rate: str) -> list[tuple[str, ...]]:
    """Of the gap of a rate by each factor; only of settings that all have the same seeds."""
    by_setting = {setting: gaps(own[rate], own["none"]) for setting, own in grid.items()}
    seeds = set.intersection(*({*found} for found in by_setting.values()))
    if not seeds:
        return []
    whole = [fmean(found[seed] for found in by_setting.values()) for seed in sorted(seeds)]
    means = [fmean(found[seed] for seed in seeds) for found in by_setting.values()]
    of = f"{rate} dropped"
    lines: list[tuple[str, ...]] = [(of, "rate", "none", rate, signed(whole), _range(means))]
    for name in FACTORS:
        low, high = sorted({getattr(setting, name) for setting in by_setting})
        pairs = [
            (by_setting[one], by_setting[other])
            for one in by_setting
            for other in by_setting
            if getattr(one, name) == low and getattr(other, name) == high
            if all(getattr(one, rest) == getattr(other, rest) for rest in FACTORS if rest != name)
        ]
        changes = [fmean(two[seed] - one[seed] for one, two in pairs) for seed in sorted(seeds)]
        each = [fmean(two[seed] - one[seed] for seed in seeds) for one, two in pairs]
        lines.append((of, name, f"{low:g}", f"{high:g}", signed(changes), _range(each)))
    return lines


def _coverage(grid: Found) -> str:
    lines = []
    for steps in sorted({setting.steps for setting in grid}):
        for rate in RATES:
            rows = [
                (setting, row)
                for setting, own in grid.items()
                if setting.steps == steps
                for run in own[rate].values()
                for row in run.rows
            ]
            clients = [min(row["coverage"]) / row["accepted"] for _, row in rows]
            had = [min(row["layer_steps"]) / (row["accepted"] * steps) for _, row in rows]
            lines.append(
                (
                    f"{steps} steps, {rate} dropped",
                    f"{fmean(clients):.1%}",
                    f"{min(clients):.0%}",
                    f"{fmean(had):.0%}",
                )
            )
    columns = ("", "coverage", "least", "steps of the layer with the fewest")
    return COVERAGE_HEAD + markdown_table(columns, lines)


def _support(found: Found, steps_of_grid: int) -> str:
    """Verdicts, which were written when all seeds were in; their numbers follow the file."""
    constant = next(own for setting, own in found.items() if setting.schedule == "constant")
    rounds = next(iter(found)).rounds
    short = rounds // 3

    def steps(rate: str, rounds: int) -> float:
        return fmean(
            min(
                sum(layer)
                for layer in zip(*(r["layer_steps"] for r in run.rows[:rounds]), strict=True)
            )
            for run in constant[rate].values()
        )

    def loss(rate: str, last: int) -> float:
        return fmean(final_loss(run, last=last) for run in constant[rate].values())

    def level(rate: str) -> str:
        ends = (after(rate, rounds // 2), after(rate, rounds))
        return " to ".join(f"{one:.2f}" for one in ends)

    def after(rate: str, last: int) -> float:
        """A round's own evaluation, mean over seeds."""
        return fmean(
            row["global_loss"]
            for run in constant[rate].values()
            for row in run.rows
            if row["round"] == last
        )

    return SUPPORT.format(
        steps=steps_of_grid,
        level=level("a third"),
        plain_level=level("none"),
        plain_end=after("none", short),
        long=rounds,
        short=short,
        more=steps("a third", rounds) / steps("none", short),
        half_more=steps("half", rounds) / steps("none", short),
        dropped=loss("a third", rounds),
        half=loss("half", rounds),
        plain=loss("none", short),
    )


def _range(values: list[float]) -> str:
    return bare(f"{min(values):+.3f} to {max(values):+.3f}")


def _long(found: Found) -> str:
    lines = []
    for setting, own in found.items():
        ends = [round * setting.rounds // 3 for round in (1, 2, 3)]
        for rate in RATES[1:]:
            parts = [gaps(own[rate], own["none"], partial(final_loss, last=last)) for last in ends]
            left = {seed: parts[-1][seed] / early for seed, early in parts[0].items() if early > 0}
            lines.append(
                (
                    f"{rate} dropped, {setting.schedule} rate",
                    *(signed(part.values()) for part in parts),
                    ", ".join(f"{one:.0%}" for one in left.values()) or "–",
                    verdict(share - 0.5 for share in left.values())
                    if len(left) == len(parts[0])
                    else "open",
                )
            )
    if not found:
        return ""
    one = next(iter(found))
    columns = ("", *(f"gap, round {n * one.rounds // 3}" for n in (1, 2, 3)), "share left", "P2")
    return LONG_HEAD.format(setting=one) + markdown_table(columns, lines)


def draw() -> None:
    """Loss against steps: a panel per setting, a line per rate, the range of seeds as a band."""
    from matplotlib.figure import Figure

    grid, long = _parted(_read()[2])
    with style():
        figure = Figure(figsize=(11, 7.4), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1.25))
        above, below = parts
        upper = above.subplots(2, 4, sharex=True, sharey=True)
        for axes, setting in zip(upper.flat, grid, strict=False):
            _panel(axes, setting, grid[setting], str(setting))
        lower = below.subplots(1, 2, sharey=True)
        for axes, setting in zip(lower, long, strict=False):
            _panel(axes, setting, long[setting], f"{setting}: {setting.schedule} learning rate")
        handles, labels = upper[0, 0].get_legend_handles_labels()
        above.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        below.supxlabel("steps of a client in every round (range of seeds shaded)", fontsize=9.5)
        for part in parts:
            part.supylabel("loss of the global model", fontsize=9.5)
        figure.savefig(FIGURE, dpi=130, facecolor="white")


def _panel(axes: Any, setting: Setting, own: Mapping[str, Seeds], title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y")
    for index, rate in enumerate(RATES):
        curves: dict[int, list[float]] = {}
        for run in own[rate].values():
            for row in run.rows:
                if row["global_loss"] is not None:
                    curves.setdefault(row["round"] * setting.steps, []).append(row["global_loss"])
        steps = sorted(curves)
        axes.plot(
            steps,
            [fmean(curves[one]) for one in steps],
            **looks(index),
            markersize=4,
            label=f"{rate} dropped",
        )
        axes.fill_between(
            steps,
            [min(curves[one]) for one in steps],
            [max(curves[one]) for one in steps],
            color=looks(index)["color"],
            alpha=0.15,
            linewidth=0,
        )


if __name__ == "__main__":
    draw()
