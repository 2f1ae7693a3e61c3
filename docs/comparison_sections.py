"""The parts of the results about methods side by side, and about the configurator's policies."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from studies import outcome_of, seeds_of_comparison
from tables import (
    FIGURES,
    markdown_table,
    processor,
    read_compared,
    read_table,
    read_values,
    was_compared,
)

from droppeft.comparison.study_files import RunRecord, Study
from droppeft.comparison.summary import Part, summary
from droppeft.comparison.writers import COLUMNS, failures, heading, references

DEVELOPMENT = "Development data (20 Newsgroups), the built-in model."
COMPARISONS = {
    "contest": (
        "The contest",
        "The built-in model, [data](#data-and-models-of-the-contest) on which no variant was "
        "chosen ([but for what decision 0009 says](decisions/0009-the-contest.md)). Every method "
        "that claims speed, Dirichlet alpha 1, 20 clients of three kinds.",
    ),
    "contest_deep": (
        "The contest on twelve layers",
        "As above on [`deep12`](#data-and-models-of-the-contest). *droppeft, all shared* was added "
        "after the results on six layers were known, which include AG News and QQP with these "
        "seeds: only the model is new to it.",
    ),
    "contest_confirmation": (
        "Depth by client with everything shared, on new seeds",
        "The contest's data and the built-in model, with seeds that the contest did not use: does "
        "what was chosen after the contest hold (decision 0009, 12)?",
    ),
    "heterogeneity_unlike": (
        "The contest's AG News, clients very unlike",
        "The contest's AG News at Dirichlet alpha .1; targets are from this study's FedLoRA.",
    ),
    "heterogeneity_alike": (
        "The contest's AG News, clients nearly alike",
        "The same at Dirichlet alpha 10.",
    ),
    "contest_others": (
        "The other methods on AG News",
        "As the contest. Where the adapter or the server is not FedLoRA's, the learning rate is "
        "the best one [on development data](#learning-rates-for-the-other-methods). No "
        "measured times are shown, because they cannot be compared: other work ran beside some "
        "variants and not beside others.",
    ),
    "rates": (
        "Learning rates for the other methods",
        f"{DEVELOPMENT} One seed, used in no contest: enough to choose by, not for claims. Twenty "
        "clients of three kinds, Dirichlet alpha 1. The rate with the highest final accuracy "
        "was chosen.",
    ),
    "ia3": (
        "IA3 as deep as LoRA was tried",
        f"{DEVELOPMENT} Two seeds, used in no contest. Twenty clients of three kinds, Dirichlet "
        "alpha 1. IA3 with a rate of .01 unless said otherwise; *all shared*: the last three "
        "layers or the last two, as the configurator finds for each kind of client.",
    ),
    "depth": (
        "How many layers to train, and on which client",
        f"{DEVELOPMENT} LoRA in the last layers alone, Dirichlet alpha 1, 20 clients of three "
        "kinds; *depth by client*: the last three or the last two, as the configurator finds. "
        "Frozen layers are cached. The contest's variants were chosen from this study.",
    ),
    "one_client": (
        "One client, rates from none to half",
        f"{DEVELOPMENT} One client holds all rows: what a rate costs and saves without federation.",
    ),
    "many_clients": (
        "Twenty clients of three kinds, all layers shared",
        f"{DEVELOPMENT} Layer dropout alone, other methods and controls, Dirichlet alpha 1.",
    ),
}
UNFIT = ("contest_others",)
"""Comparisons whose measured times cannot be compared."""

COMPARISON_HEAD = """\
## {title}

`droppeft compare benchmarks/{name}/study.toml`, {seeds}. {about}
{target}F1: of class 1 where there are two
classes, else the mean over classes. Modelled: on the clients' profiles{measured}. A run took
{cell:.0f} seconds (median) on {place}. Everything is in
[`benchmarks/{name}`](../benchmarks/{name}); `droppeft report benchmarks/{name}` draws a page of it.
"""

MEASURED = (
    "; measured (m.): as if clients ran in parallel, while other work ran on the machine: use "
    "measured times as ratios only"
)

DATA = """\
## Data and models of the contest

Neither is part of this repository. These are the files that were used (in `$DROPPEFT_DATA`), with
training and test rows. Other files with the same columns work too, and give other numbers.

- `ag_news`, news in four classes (26,855 and 7,600): a class-balanced part of the 120,000.
- `qqp`, pairs of questions, class 1 for duplicates (21,391 and 7,598): parts, 49 % duplicates
  in training and 36 % in test, so that an accuracy may rise while F1 falls.
- `mnli`, pairs of sentences in three classes (12,808 and 9,815): a part, its training texts mostly
  without full stops; the matched development set.
- `news20`, 20 Newsgroups, for development (11,222 and 7,452): headers, quotes and footers stripped.
- `builtin`: all-MiniLM-L6-v2, six layers, 384 wide; it comes with the installation.
- `deep12`, an encoder of twelve layers, 384 wide, made of the built-in model: every layer twice,
  its residual branches scaled down, then trained until every second hidden state was the teacher's
  (cosine of the last states .952). Neighbouring layers are more alike than in a model that was
  pretrained with twelve, which may make it easier to train some of them only.

Accuracies are on 1,000 of the test rows, the same in every run; clients' own test rows are a part
of the training rows.
"""

TARGET = "The target is what `{}` ends with on the same seed, less {:g}. "

SYNTHETIC_HEAD = """\
## Policies on problems whose answer is known

`benchmarks/configurator_synthetic`: no model and no data. In a simulated run each local training
reduces the remaining loss by a part, which is observed with noise; three kinds of client,
{clients} a round, {arms} arms, {seeds} seeds. Modelled time to 5 % of the loss, over that of the
best fixed arm in hindsight (mean, bootstrap 95 % interval). Below 1 is faster than any single arm
for all clients can be, because slower clients get cheaper arms. "As if alike": arms are chosen
without knowing which client is slow. Policies that learn pay {measuring:.1%} of a full local
training for measuring the reward, as with the defaults of a run; fixed arms and random choice pay
nothing. The window is {window} rounds unless said otherwise. Idle: part of the clients' time in
which they wait for the slowest one.
"""
PLAYERS = (
    "best fixed arm per kind of device",
    "budgeted_thompson",
    "budgeted_thompson, window 5",
    "budgeted_thompson, window 40",
    "sliding_window_ucb",
    "epsilon_greedy",
    "successive_halving",
    "budgeted_thompson, as if alike",
    "uniform_random",
)


def comparison_sections() -> list[str]:
    """A section per comparison that was made, and what they were made on."""
    return [*(_comparison(name) for name in COMPARISONS if was_compared(name)), DATA]


def synthetic_sections() -> list[str]:
    """The section on made-up problems."""
    return [_synthetic(read_values("configurator_synthetic"))]


def _comparison(name: str) -> str:
    study, records, parts = read_parts(name)
    results = [outcome_of(one) for one in records if one.result is not None]
    walls = sorted(result["host_wall_s"] for result in results)
    title, about = COMPARISONS[name]
    target = study.target
    head = COMPARISON_HEAD.format(
        title=title,
        name=name,
        about=about,
        seeds=seeds_of_comparison(study, records),
        target=TARGET.format(target.variant, target.minus) if target else "",
        measured="" if name in UNFIT else MEASURED,
        place=" and ".join(dict.fromkeys(processor(one["machine"]) for one in results)),
        cell=walls[len(walls) // 2],
    )
    picture = []
    if (FIGURES / f"{name}.png").is_file():
        picture = [f"![{title}: time, accuracies and traffic](figures/{name}.png)\n"]
    rounds: dict[tuple[str, str], int] = {}
    for one in records:
        if one.result is not None:
            rounds[one.place] = max(rounds.get(one.place, 0), one.result["rounds"])
    return "\n".join(
        [
            head,
            *picture,
            *(_part(part, rounds[part.data, part.model], name in UNFIT) for part in parts),
        ]
    )


def read_parts(name: str) -> tuple[Study, list[RunRecord], list[Part]]:
    """A comparison with its parts, own majorities filled in where its runs do not know them."""
    study, records = read_compared(name)
    parts = summary(study, records)
    found = read_values("own_majority")["accuracies"].get(name, {})
    return study, records, [_with_own_majority(part, found, study.seeds) for part in parts]


def _with_own_majority(
    part: Part, found: Mapping[str, Mapping[str, float]], seeds: Sequence[int]
) -> Part:
    by_seed = found.get(Path(part.data).name)
    if part.own_majority is not None or by_seed is None:
        return part
    return replace(part, own_majority=fmean(by_seed[str(seed)] for seed in seeds))


def _part(part: Part, rounds: int, unmeasured: bool) -> str:
    measured = ("to target, measured", "speed-up (m.)") if unmeasured else ()
    cells = {name: cell for name, cell in COLUMNS.items() if name not in measured}
    table = markdown_table(
        list(cells), [[cell(row) for cell in cells.values()] for row in part.rows]
    )
    return "\n".join(
        [
            f"{heading(part)}, {rounds} rounds:\n",
            table,
            *(f"{line}\n" for line in (*references(part), *failures(part))),
        ]
    )


def _synthetic(content: Mapping[str, Any]) -> str:
    settings = content["settings"]
    head = SYNTHETIC_HEAD.format(
        clients=settings["clients"],
        arms=len(settings["arms"]),
        seeds=settings["seeds"],
        window=settings["window"],
        measuring=settings["measuring"],
    )
    records: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in read_table("configurator_synthetic"):
        records.setdefault(row["problem"], {})[row["policy"]] = row
    rows = [
        [
            name,
            found["best_fixed_arm"],
            *(_ratio(records[name][player]) for player in PLAYERS),
            f"{found['mean_fixed_ratio']:.2f}",
        ]
        for name, found in content["problems"].items()
    ]
    columns = ("problem", "best fixed arm", *PLAYERS, "mean fixed arm")
    thompson = [rows["budgeted_thompson"] for rows in records.values()]
    fixed = [found["best_fixed_idle_share"] for found in content["problems"].values()]
    idle = (
        f"Idle: {_range([one['idle_share'] for one in thompson])} with `budgeted_thompson`, "
        f"{_range(fixed)} with the best fixed arm.\n"
    )
    return "\n".join([head, markdown_table(columns, rows), idle])


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['time_ratio']:.2f} ({row['time_ratio_low']:.2f} to {row['time_ratio_high']:.2f})"


def _range(values: list[float]) -> str:
    ends = (f"{min(values):.0%}", f"{max(values):.0%}")
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
