"""Tables about gradients of cheaper steps: how close to full depth, and what they bring."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.pages.markdown import markdown_table
from benchmarks.pages.speed import NOT_MEASURED
from benchmarks.study import read_table

Row = Mapping[str, Any]

NAME = "gradient_fidelity"
SHOWN = 4
"""Layers that are named at either end."""


def read_candidates(model: str) -> dict[str, list[Row]]:
    """By candidate, its rows with the initial values and after training."""
    found: dict[str, list[Row]] = {}
    for row in read_table(NAME):
        if row["model"] == model:
            found.setdefault(row["candidate"], []).append(row)
    return found


def gradient_fidelity(model: str) -> str:
    """Cost, cosines and second moment of each candidate, before and after training."""
    columns: dict[str, Callable[[Row], str]] = {
        "cosine, same batch": lambda row: f"{row['cosine']:.3f}",
        "cosine of the expectations": lambda row: _or_dash(row["expectation_cosine"]),
        "second moment (of draws)": lambda row: (
            f"{row['second_moment']:.2f} ({max(0.0, row['draws_moment']):.2f})"
        ),
    }
    return _table(read_candidates(model), columns, with_cost=True)


def gradient_merits(model: str) -> str:
    """Figures of merit per cost of each candidate, full depth being 1."""
    columns = {
        "batch": _with_error("batch"),
        "expected": _with_error("best"),
        "signs": _with_error("signs"),
    }
    return _table(read_candidates(model), columns, with_cost=True)


def head_gradients(model: str) -> str:
    """Cosines with full depth of the same batch: adapters, head, and both."""
    columns: dict[str, Callable[[Row], str]] = {
        "adapters": lambda row: f"{row['cosine']:.3f}",
        "head": lambda row: f"{row['head_cosine']:.3f}",
        "both": lambda row: f"{row['both_cosine']:.3f}",
    }
    return _table(read_candidates(model), columns, with_cost=False)


def added_losses() -> str:
    """The layers that add the largest and the smallest loss when they alone are skipped."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in read_table(NAME, "calibration"):
        found.setdefault((row["model"], row["after_steps"]), []).append(row)
    lines = []
    for (model, steps), rows in found.items():
        ordered = sorted(rows, key=lambda row: -row["added_loss"])
        ends = _layers(ordered[:SHOWN]), _layers(ordered[-SHOWN:])
        median = ordered[len(ordered) // 2]["added_loss"]
        lines.append((model, str(steps), ends[0], f"{median:+.3f}", ends[1]))
    return markdown_table(("model", "after steps", "most", "median", "least"), lines)


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _layers(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row['layer']}: {row['added_loss']:+.3f}" for row in rows)


def _with_error(of: str) -> Callable[[Row], str]:
    return lambda row: f"{row[of]:.2f} ± {row[f'{of}_error']:.2f}"


def _table(
    found: Mapping[str, Sequence[Row]],
    columns: Mapping[str, Callable[[Row], str]],
    *,
    with_cost: bool,
) -> str:
    """A row per candidate, with each column at the start and after training."""
    if not found:
        return NOT_MEASURED
    first = next(iter(found.values()))
    points = ["start" if not row["after_steps"] else f"{row['after_steps']} steps" for row in first]
    heads = [f"{name}, {point}" for name in columns for point in points]
    lines = [
        (
            candidate,
            *([f"{rows[0]['cost']:.2f}"] if with_cost else []),
            *(show(row) for show in columns.values() for row in rows),
        )
        for candidate, rows in found.items()
    ]
    return markdown_table(("step", *(["cost"] if with_cost else []), *heads), lines)
