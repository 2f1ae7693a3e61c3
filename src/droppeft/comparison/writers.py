"""Write a comparison as files: its data, a CSV file, and tables in Markdown. Ours."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from droppeft.comparison.answer import MODELLED, answer, clock_of, traffic
from droppeft.comparison.study_files import STUDY, RunRecord, Study, read_tables, write_tables
from droppeft.comparison.summary import Part, Spread, VariantRow, spread_text
from droppeft.files import write_atomically
from droppeft.quantities import counted
from droppeft.tasks.metrics import CHRF, F1, ROUGE_L

CSV, MARKDOWN = "comparison.csv", "comparison.md"


def _seconds(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    places = 0 if spread.mean >= 100 else 2
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:,.{places}f}"
    return f"{spread.mean:,.{places}f}{deviation} s"


def _to_target(row: VariantRow, spread: Spread | None) -> str:
    if spread is None and row.reached is not None:
        return f"{row.reached} of {counted(row.seeds, 'seed')}"
    return _seconds(spread)


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} x"


def _scaled(value: float | None, unit: float, name: str) -> str:
    """With one decimal; values that would show as 0.0 get one significant digit."""
    if value is None:
        return "–"
    places = ",.1f" if not value or value / unit >= 0.05 else ".1g"
    return f"{value / unit:{places}} {name}"


COLUMNS: dict[str, Callable[[VariantRow], str]] = {
    "variant": lambda row: row.variant,
    "seeds": lambda row: str(row.seeds),
    "quality": lambda row: spread_text(row.metric, row.quality),
    "F1": lambda row: spread_text(F1, row.f1),
    "ROUGE-L": lambda row: spread_text(ROUGE_L, row.rouge_l),
    "chrF": lambda row: spread_text(CHRF, row.chrf),
    "personalised": lambda row: spread_text(row.metric, row.personalised),
    "personalised ROUGE-L": lambda row: spread_text(ROUGE_L, row.personalised_rouge_l),
    "worst tenth": lambda row: spread_text(row.metric, row.worst_tenth),
    "between clients": lambda row: spread_text(row.metric, row.between_clients),
    "to target, modelled": lambda row: _to_target(row, row.time_to_target_modelled_s),
    "speed-up": lambda row: _times(row.speed_up_modelled),
    "to target, measured": lambda row: _to_target(row, row.time_to_target_measured_s),
    "speed-up (m.)": lambda row: _times(row.speed_up_measured),
    "whole run, modelled": lambda row: _scaled(row.round_modelled_s, 1, "s"),
    "whole run, measured": lambda row: _scaled(row.round_measured_s, 1, "s"),
    "activations": lambda row: _scaled(row.activation_bytes_peak, 1e6, "MB"),
    "up": lambda row: _scaled(row.upload_bytes, 1e6, "MB"),
    "down": lambda row: _scaled(row.download_bytes, 1e6, "MB"),
    "traffic": lambda row: _scaled(traffic(row), 1e6, "MB"),
    "energy, modelled": lambda row: _scaled(row.energy_modelled_j, 1e3, "kJ"),
}
"""Columns of the Markdown, HTML and terminal tables, and how a cell is written."""

QUALITY = ("variant", "quality", "F1", "personalised", "worst tenth", "between clients")
TEXTS = ("variant", "ROUGE-L", "chrF", "personalised ROUGE-L")
TIMES = ("variant", "to target, modelled", "speed-up", "to target, measured", "speed-up (m.)")
COSTS = ("variant", "seeds", "whole run, modelled", "activations", "up", "down", "energy, modelled")
"""Columns of four tables that each fit into a terminal of 80 characters."""

SPREADS = (
    "quality",
    "f1",
    "rouge_l",
    "chrf",
    "personalised",
    "personalised_rouge_l",
    "worst_tenth",
    "between_clients",
    "time_to_target_measured_s",
    "time_to_target_modelled_s",
)
"""Fields of a :class:`VariantRow` that the CSV file has as mean and standard deviation."""


def main_columns(part: Part) -> list[str]:
    """The columns of the main table, at most eight: quality, time, memory and traffic."""
    clock = clock_of(part)
    sooner = "speed-up" if clock is MODELLED else "speed-up (m.)"
    to_target = (f"to target, {clock.name}", sooner)
    times = to_target if part.target is not None else (f"whole run, {clock.name}",)
    quality = ("variant", "quality", "F1", "ROUGE-L", "personalised")
    return known_columns(part, (*quality, *times, "activations", "traffic"))


def further_columns(part: Part) -> list[str]:
    """The variant, and every column that has values and is not among the main ones."""
    main = main_columns(part)[1:]
    return known_columns(part, [name for name in COLUMNS if name not in main])


def known_columns(part: Part, columns: Sequence[str]) -> list[str]:
    """Those of some columns that have a value for at least one variant."""
    return [name for name in columns if any(COLUMNS[name](row) != "–" for row in part.rows)]


def head(column: str, part: Part) -> str:
    """The head of a column: its name, or that of the task's primary metric."""
    return part.metric.label if column == "quality" else column


def heading(part: Part) -> str:
    """The model and the data of a part."""
    return f"{Path(part.model).name} on {Path(part.data).name}"


def references(part: Part) -> list[str]:
    """Reference values, as far as they are known: one line, or none."""
    known = {
        "the most frequent class": part.majority,
        "TF-IDF with a linear SVM on all texts": part.tfidf,
        "each client's own most frequent class (reference for personalised)": part.own_majority,
    }
    found = [
        f"{name} {value:.3f}".replace("0.", ".")
        for name, value in known.items()
        if value is not None
    ]
    if part.untrained:
        values = ", ".join(f"{name} {value:.3f}" for name, value in part.untrained.items())
        found.append(f"the model before training: {values}".replace(" 0.", " ."))
    return [f"References: {', '.join(found)}."] if found else []


def write(out: Path, study: Study, records: Sequence[RunRecord], parts: Sequence[Part]) -> None:
    """Write data and tables, each file atomically; the folder is created if necessary.

    Commands that the folder's ``study.json`` lists already stay listed.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (out / STUDY).is_file():
        commands = dict.fromkeys([*read_tables(out)[0].commands, *study.commands])
        study = replace(study, commands=tuple(commands))
    write_tables(out, study, records)
    write_atomically(out / CSV, as_csv(parts).encode())
    write_atomically(out / MARKDOWN, as_markdown(parts).encode())


def as_csv(parts: Sequence[Part]) -> str:
    """One line per part and variant; numbers are not rounded, and names contain the units."""
    lines = [
        {"data": part.data, "model": part.model, "target": part.target, **_flat(row)}
        for part in parts
        for row in part.rows
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(row: VariantRow) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in vars(row).items():
        if name == "quality_by_seed":
            continue
        if name == "failures":
            flat[name] = "; ".join(value)
        elif name == "metric":
            flat[name] = value.name
        elif name in SPREADS:
            flat[name] = value and value.mean
            flat[f"{name}_sd"] = value and value.deviation
        else:
            flat[name] = value
    return flat


def as_markdown(parts: Sequence[Part]) -> str:
    """The answer, a short and a long table per data set and model; numbers are rounded."""
    return "\n".join(map(_markdown_section, parts))


def _markdown_section(part: Part) -> str:
    paragraphs = [
        f"## {heading(part)}",
        " ".join(answer(part)),
        _markdown_table(part, main_columns(part)),
        *references(part),
        *failures(part),
        _markdown_table(part, further_columns(part)),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _markdown_table(part: Part, columns: Sequence[str]) -> str:
    lines = [[head(name, part) for name in columns], ["---"] * len(columns)]
    lines += [[COLUMNS[name](row) for name in columns] for row in part.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def failures(part: Part) -> list[str]:
    """A line per failure, and per variant with clients that could not be evaluated."""
    unmeasured = [
        f"{row.variant}: {counted(row.unmeasured, 'client')} of all runs could not be evaluated "
        f"and {'is' if row.unmeasured == 1 else 'are'} in no mean"
        for row in part.rows
        if row.unmeasured
    ]
    failed = [f"{row.variant} failed: {reason}" for row in part.rows for reason in row.failures]
    return failed + unmeasured
