"""Tables about layers that stay on clients."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.pages.markdown import markdown_table, spread
from benchmarks.pages.studies import REMOVED, Seeds, outcome_of, read_compared, runs_of
from benchmarks.study import read_table
from droppeft.comparison.study_files import RunRecord
from droppeft.comparison.summary import summary
from droppeft.comparison.writers import COLUMNS
from droppeft.sharing.criteria import CRITERIA
from droppeft.sharing.selection import count_of

ACCURACIES = ("global_accuracy", "personalised_accuracy", "personalised_worst_tenth")
HEADS = ("global", "personalised", "worst tenth")
NAMES = {
    "lot, every time": "random, drawn every time",
    "lot, for good": "random, drawn once",
    "without prefix": "without untrained layers",
}
"""Variants whose recorded name uses a word that the documentation does not."""


def personalisation() -> str:
    """Which half of the layers is personal, and other ways to personalise."""
    runs = runs_of(read_compared("personalisation")[1])
    whole = runs["share all"]
    lines = [
        (
            NAMES.get(variant, variant),
            *_accuracies(own),
            *_differences(own, whole),
            _least_covered(own),
            _traffic(own, "upload_bytes"),
        )
        for variant, own in runs.items()
        if variant not in REMOVED
    ]
    columns = ("personal", *HEADS, *_over("sharing all"), "least covered", "up")
    return markdown_table(columns, lines)


def _least_covered(own: Seeds) -> str:
    """Part of a round's clients that sent the layer that the fewest sent."""
    parts = []
    for run in own.values():
        counts = [row["coverage"] for row in run.rows]
        sent = [fmean(layer) for layer in zip(*counts, strict=True)]
        parts.append(min(sent) / outcome_of(run)["cohort_size"])
    return f"{fmean(parts):.0%}"


def sharing_by_skew() -> str:
    """How much to share, from alike to unlike clients."""
    runs = runs_of(read_compared("sharing_heterogeneity")[1])
    lines = []
    for variant, own in runs.items():
        split = variant.rpartition(", ")[0]
        known = outcome_of(next(iter(own.values())))
        layers = known["num_layers"]
        part = f"{count_of(known['sharing_fraction'], layers)} of {layers}"
        differences = _differences(own, runs[f"{split}, all"])
        up = _traffic(own, "upload_bytes")
        lines.append((split, part, *_accuracies(own), *differences, up))
    columns = ("clients", "shared", *HEADS, *_over("sharing all"), "up")
    return markdown_table(columns, lines)


def sharing_on_other_data() -> str:
    """Half of the layers personal, on other data and another model."""
    _, records = read_compared("sharing_confirmation")
    lines = []
    for data, model in dict.fromkeys(one.place for one in records):
        runs = runs_of([one for one in records if one.place == (data, model)])
        for variant, own in runs.items():
            differences = _differences(own, runs["share all"])
            place = f"{Path(data).name}, {Path(model).name}"
            lines.append((place, NAMES.get(variant, variant), *_accuracies(own), *differences))
    columns = ("data, model", "personal", *HEADS, *_over("sharing all"))
    return markdown_table(columns, lines)


def newcomers() -> str:
    """Clients that never trained, before and after an epoch on their own texts."""
    keys = (
        "global_accuracy",
        "personalised_accuracy_trained",
        "newcomers_accuracy",
        "newcomers_accuracy_after_epoch",
    )
    runs = runs_of(read_compared("newcomers")[1])
    lines = []
    for variant, own in runs.items():
        results = [outcome_of(run) for run in own.values()]
        count = fmean(result["newcomers"] or 0 for result in results)
        found = (spread([result[key] for result in results]) for key in keys)
        lines.append((variant, *found, f"{count:.1f}"))
    columns = ("run", "global", "trained", "newcomers", "after an epoch", "newcomers a run")
    return markdown_table(columns, lines)


def ablation() -> str:
    """The parts of the method, each taken away: accuracy."""
    runs = runs_of(read_compared("ablation")[1])
    whole = runs["all parts"]
    lines = [
        (NAMES.get(variant, variant), *_accuracies(own), *_differences(own, whole))
        for variant, own in runs.items()
    ]
    return markdown_table(("run", *HEADS, *_over("all parts")), lines)


def ablation_costs() -> str:
    """The parts of the method, each taken away: time, memory and traffic."""
    study, records = read_compared("ablation")
    [part] = summary(study, records)
    names = ("to target, modelled", "whole run, modelled", "activations", "up", "down")
    lines = [
        (NAMES.get(row.variant, row.variant), *(COLUMNS[name](row) for name in names))
        for row in part.rows
    ]
    return markdown_table(("run", *names), lines)


def _over(other: str) -> tuple[str, str]:
    return f"over {other}: global", f"over {other}: personalised"


def _accuracies(own: Seeds) -> list[str]:
    return [spread([outcome_of(run)[key] for run in own.values()]) for key in ACCURACIES]


def _differences(own: Seeds, other: Seeds) -> list[str]:
    """In points of accuracy, seed by seed; empty for the other itself."""
    if own is other:
        return ["–", "–"]
    found = []
    for key in ACCURACIES[:2]:
        pairs = [(_value(own[seed], key), _value(other[seed], key)) for seed in own]
        points = [100 * (a - b) for a, b in pairs if a is not None and b is not None]
        found.append(", ".join(f"{one:+.1f}" for one in points) or "–")
    return found


def _value(run: RunRecord, key: str) -> float | None:
    value: float | None = outcome_of(run)[key]
    return value


def _traffic(own: Seeds, key: str) -> str:
    return f"{fmean(outcome_of(run)[key] or 0 for run in own.values()) / 1e6:.1f} MB"


def criteria() -> str:
    """The criteria by which a client chooses its personal layers."""
    columns = ("criterion", "what it measures", "runs the model", "collects")
    rows = [
        (f"`{name}`", one.summary, one.runs_model, one.needs or "–")
        for name, one in CRITERIA.items()
    ]
    return markdown_table(columns, rows)


def scoring_costs() -> str:
    """What scoring layers adds to a local training, by criterion."""
    repeats: dict[str, list[Mapping[str, Any]]] = {}
    for row in read_table("sharing_criteria", "repeats"):
        repeats.setdefault(row["criterion"], []).append(row)
    plain = repeats.pop("none")
    rows = [
        (f"`{name}`", f"{own[0]['scoring_tokens']:,}", _extra(plain, own))
        for name, own in repeats.items()
        if name not in REMOVED
    ]
    return markdown_table(("criterion", "tokens run to score", "extra CPU time"), rows)


def _extra(plain: Sequence[Mapping[str, Any]], repeats: Sequence[Mapping[str, Any]]) -> str:
    """Ratio of medians less one, with a bootstrap interval."""
    own, base = (np.array([row["cpu_s"] for row in rows]) for rows in (repeats, plain))
    drawn = np.random.default_rng(0).integers(0, len(own), (2000, 2, len(own)))
    ratios = np.median(own[drawn[:, 0]], axis=1) / np.median(base[drawn[:, 1]], axis=1) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    return f"{median(own) / median(base) - 1:+.1%} ({low:+.1%} to {high:+.1%})"
