"""Tables of methods side by side: accuracy, time to the target, memory and traffic."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.pages import studies
from benchmarks.pages.markdown import bare, markdown_table
from benchmarks.pages.studies import REMOVED, label
from benchmarks.study import read_values
from droppeft.comparison.study_files import Row, RunRecord, Study
from droppeft.comparison.summary import Part, VariantRow, summary
from droppeft.comparison.writers import COLUMNS, head

HEADS = {"speed-up": "speed-up, modelled", "speed-up (m.)": "speed-up, measured"}
"""Heads of columns that differ from their names in `COLUMNS`."""

CELLS = {**COLUMNS, "accuracy": COLUMNS["quality"]}
"""Columns by name; all studies so far are about classification, whose quality is accuracy."""

OF_TWO_CLASSES = "F1"
"""A column that is shown for data with two classes only, where several data sets share a table."""


@dataclass(frozen=True)
class Compared:
    """A comparison, summarised: a part per data set and model, and the data with two classes."""

    name: str
    study: Study
    parts: Sequence[Part]
    of_two_classes: frozenset[str]


def read_parts(name: str) -> Compared:
    """A comparison with its parts, own majorities filled in where its runs do not know them."""
    return _read(studies.STUDIES / name)


@cache
def _read(folder: Path) -> Compared:
    name = folder.name
    study, records = studies.read_compared(name)
    found = read_values("own_majority")["accuracies"].get(name, {})
    parts = [
        _with_own_majority(part, found.get(Path(part.data).name), study.seeds)
        for part in summary(study, records)
    ]
    return Compared(name, study, parts, _of_two_classes(records))


def _of_two_classes(records: Sequence[RunRecord]) -> frozenset[str]:
    return frozenset(one.data for one in records if one.result and one.result["classes"] == 2)


def _with_own_majority(
    part: Part, by_seed: Mapping[str, float] | None, seeds: Sequence[int]
) -> Part:
    if part.own_majority is not None or by_seed is None:
        return part
    return replace(part, own_majority=fmean(by_seed[str(seed)] for seed in seeds))


def comparison(
    study: str, data: str, columns: Sequence[str], variants: Sequence[str] | None = None
) -> str:
    """A row per variant of one data set, with columns of :data:`COLUMNS`.

    Args:
        variants: those to show, by their recorded names; all that are still offered if not given.
    """
    compared = read_parts(study)
    part, *others = [one for one in compared.parts if Path(one.data).name == data]
    # A variant with a model of its own has its results in another part.
    elsewhere = {row.variant: row for one in others for row in one.rows if row.seeds}
    lines = [
        [
            label(study, row.variant),
            *(_cell(name, elsewhere.get(row.variant, row)) for name in columns),
        ]
        for row in _shown(part, variants)
    ]
    lines += _references(part, columns)
    heads = [HEADS.get(name, head(name, part)) for name in columns]
    return markdown_table(["variant", *heads], lines)


def by_data(
    study: str,
    columns: Sequence[str] = (),
    largest: Sequence[str] = (),
    variants: Sequence[str] | None = None,
) -> str:
    """A row per variant: the columns of every data set, and what is largest over the data sets.

    Args:
        columns: of :data:`COLUMNS`, shown for each data set.
        largest: columns shown once, of the data set on which they are largest.
        variants: those to show, by their recorded names; all that are still offered if not given.
    """
    compared = read_parts(study)
    shown = [(part, name) for part in compared.parts for name in _of_part(compared, part, columns)]
    rows = {part.data: {row.variant: row for row in part.rows} for part in compared.parts}
    lines = []
    for row in _shown(compared.parts[0], variants):
        own = [of_part[row.variant] for of_part in rows.values()]
        lines.append(
            [
                label(study, row.variant),
                *(_cell(name, rows[part.data][row.variant]) for part, name in shown),
                *(_largest(name, own) for name in largest),
            ]
        )
    heads = [f"{_title(compared, part)}: {HEADS.get(name, name)}" for part, name in shown]
    return markdown_table(["variant", *heads, *largest], lines)


def _of_part(compared: Compared, part: Part, columns: Sequence[str]) -> list[str]:
    two = part.data in compared.of_two_classes
    return [name for name in columns if two or name != OF_TWO_CLASSES]


def _title(compared: Compared, part: Part) -> str:
    """Name of the data, and how many seeds where the study asked for more."""
    seeds = max(row.seeds for row in part.rows)
    name = Path(part.data).name
    return name if seeds == len(compared.study.seeds) else f"{name} ({seeds} seed)"


def _shown(part: Part, variants: Sequence[str] | None) -> list[VariantRow]:
    rows = {row.variant: row for row in part.rows}
    if variants is not None:
        return [rows[name] for name in variants]
    return [row for name, row in rows.items() if name not in REMOVED]


def _cell(name: str, row: VariantRow) -> str:
    """A cell as `droppeft compare` shows it; a speed-up says how many seeds reached the target."""
    cell = CELLS[name](row)
    if name in HEADS and cell == "–" and row.reached is not None:
        return f"{row.reached} of {row.seeds} seeds"
    return cell


LARGEST: dict[str, Callable[[VariantRow], float]] = {
    "activations": lambda row: row.activation_bytes_peak or 0,
    "up": lambda row: row.upload_bytes or 0,
    "down": lambda row: row.download_bytes or 0,
}


def _largest(name: str, rows: Sequence[VariantRow]) -> str:
    return COLUMNS[name](max(rows, key=LARGEST[name]))


def _references(part: Part, columns: Sequence[str]) -> list[list[str]]:
    """Rows of what needs no federated training, with the values that it has."""
    known: dict[str, Mapping[str, float | None]] = {
        "*TF-IDF + SVM, all texts in one place*": {"accuracy": part.tfidf},
        "*most frequent class*": {"accuracy": part.majority},
        "*each client's most frequent class*": {"personalised": part.own_majority},
        "*the model before training*": part.untrained,
    }
    heads = [head(name, part) for name in columns]
    rows = {name: [values.get(one) for one in heads] for name, values in known.items()}
    return [[name, *map(_share, row)] for name, row in rows.items() if {*row} != {None}]


def references(study: str) -> str:
    """What a data set's targets and references are."""
    compared = read_parts(study)
    rows = [
        (
            Path(part.data).name,
            _share(part.target),
            _share(part.tfidf),
            _share(part.majority),
            _share(part.own_majority),
        )
        for part in compared.parts
    ]
    columns = (
        *("data", "target", "TF-IDF + SVM, all texts in one place", "most frequent class"),
        "each client's most frequent class, on its own texts",
    )
    return markdown_table(columns, rows)


def _share(value: float | None) -> str:
    return "–" if value is None else bare(f"{value:.3f}")


def by_seed(values: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Final values of the global model on each seed, of variants of studies with the same seeds.

    Args:
        values: names of metrics, as ``loss``.
        rows: study, variant, and the setting's name.
    """
    found = [(one["setting"], _final(one["study"], one["variant"])) for one in rows]
    seeds = sorted(found[0][1])
    heads = [f"{value}, seed {seed}" for value in values for seed in seeds]
    lines = [
        [
            setting,
            *(_share(of_seed[seed][f"global_{value}"]) for value in values for seed in seeds),
        ]
        for setting, of_seed in found
    ]
    return markdown_table(["setting", *heads], lines)


def _final(study: str, variant: str) -> dict[int, Row]:
    _, records = studies.read_compared(study)
    return {
        one.seed: one.result for one in records if one.variant == variant and one.result is not None
    }


def recommendations(data: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Which setting to use: a few variants of several studies, with what each costs.

    Args:
        data: names of data sets that all these studies have; memory and traffic are the first's.
        rows: study, variant, the setting's name, and where it fails.
    """
    columns = ("setting", "accuracy", "sooner than FedLoRA", "memory", "traffic", "where it fails")
    return markdown_table(columns, [_recommended(data, **row) for row in rows])


def settings_by_model(studies: Sequence[Mapping[str, Any]]) -> str:
    """A few settings for each of several models, with what each brings and costs.

    Args:
        studies: for each a comparison on one data set (`study`), names of model and data (`name`),
            and `rows`: variant, the setting's name, and where it fails.
    """
    columns = ("", "setting", "quality", "sooner", "activations", "traffic", "where it fails")
    return markdown_table(
        columns,
        [
            (one["name"] if number == 0 else "", *_setting(one["study"], **row))
            for one in studies
            for number, row in enumerate(one["rows"])
        ],
    )


def _setting(study: str, variant: str, setting: str, fails: str) -> Sequence[str]:
    [part] = read_parts(study).parts
    [row] = [row for row in part.rows if row.variant == variant]
    return (
        setting,
        f"{part.metric.label} {COLUMNS['quality'](row)}",
        _cell("speed-up", row),
        COLUMNS["activations"](row),
        f"{((row.upload_bytes or 0) + (row.download_bytes or 0)) / 1e6:.1f} MB",
        fails,
    )


def _recommended(
    data: Sequence[str], study: str, variant: str, setting: str, fails: str
) -> Sequence[str]:
    by_data = {
        Path(part.data).name: row
        for part in read_parts(study).parts
        for row in part.rows
        if row.variant == variant
    }
    found = [by_data[name] for name in data]
    traffic = ((found[0].upload_bytes or 0) + (found[0].download_bytes or 0)) / 1e6
    return (
        setting,
        ", ".join(_share(row.quality.mean if row.quality else None) for row in found),
        ", ".join(_cell("speed-up", row) for row in found),
        COLUMNS["activations"](found[0]),
        f"{traffic:.1f} MB",
        fails,
    )
