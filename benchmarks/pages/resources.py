"""Tables about memory and time of a step: savings, estimates, frozen layers, matrix kernels."""

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.pages.markdown import markdown_table, megabytes
from benchmarks.study import read_table, read_values

Row = Mapping[str, Any]


def memory_savings() -> str:
    """Memory that training adds to a process, and what is saved of it, by model."""
    by_model = _cells()
    lines = [
        (
            "none" if cell == "rate 0" else cell.removeprefix("rate 0, "),
            *(text for cells in by_model.values() for text in _saving(cell, cells)),
        )
        for cell in next(iter(by_model.values()))
    ]
    heads = (f"{model}{what}" for model in by_model for what in ("", ": less"))
    return markdown_table(("savings", *heads), lines)


def memory_savings_at_16x128() -> str:
    """The same shares at batches of 16 texts of 128 tokens, modelled, and beside the process."""
    by_model = _cells()
    lines = [
        (
            cell.removeprefix("rate 0, "),
            *(
                _less(cells, cell, "measured_bytes", with_process=True)
                for cells in by_model.values()
            ),
            *(_less(cells, cell, "modelled_16x128_bytes") for cells in by_model.values()),
        )
        for cell in next(iter(by_model.values()))
        if cell != "rate 0"
    ]
    heads = (
        *(f"{one}, with the process" for one in by_model),
        *(f"{one}, 16 x 128" for one in by_model),
    )
    return markdown_table(("savings", *heads), lines)


def _cells() -> dict[str, dict[str, Row]]:
    """Cells by model and name: all at rate 0 and .5, half of each model's layers being frozen."""
    by_model: dict[str, dict[str, Row]] = {}
    for row in read_table("cost_model"):
        model, _, cell = row["cell"].partition(", ")
        if not re.match(r"rate 0\.[27]5", cell):
            name = _named(cell).replace("rate 0.5", "half dropped")
            by_model.setdefault(model, {})[name] = row
    return by_model


def _named(cell: str) -> str:
    """A cell's name without the depth of its model, in the words of the documentation."""
    return re.sub(r"\d+ frozen", "half frozen", cell).replace("per turn", "once a round")


def _saving(cell: str, cells: Mapping[str, Row]) -> Sequence[str]:
    return megabytes(cells[cell]["measured_bytes"]), _less(cells, cell, "measured_bytes")


def _less(cells: Mapping[str, Row], cell: str, key: str, *, with_process: bool = False) -> str:
    full = cells["rate 0"]
    besides = full["process_bytes"] if with_process else 0
    return f"{1 - (cells[cell][key] + besides) / (full[key] + besides):.0%}"


def estimate_errors() -> str:
    """How far estimates of memory and time are from what was measured, in per cent."""
    by_model: dict[str, dict[str, Row]] = {}
    for row in read_table("cost_model"):
        model, _, cell = row["cell"].partition(", ")
        by_model.setdefault(model, {})[_named(cell)] = row
    lines = [
        (
            cell,
            *(f"{cells[cell]['memory_error']:+.1%}" for cells in by_model.values()),
            *(_time_error(cells[cell]) for cells in by_model.values()),
        )
        for cell in next(iter(by_model.values()))
    ]
    heads = (f"{what}, {model}" for what in ("memory", "time") for model in by_model)
    return markdown_table(("drop rate, savings", *heads), lines)


def _time_error(row: Row) -> str:
    return "–" if row["time_error"] is None else f"{row['time_error']:+.0%}"


VISITS = {"no cache": "no cache", "first visit": "first use", "later visit": "later use"}
"""Recorded names of how often a text was used, and those of the table."""


def frozen_layers() -> str:
    """Time of a step behind frozen layers, against LoRA in all layers at full depth."""
    arms: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in read_table("frozen_layers"):
        arms.setdefault((row["model"], row["frozen"], row["dropped"]), {})[row["visit"]] = row
    depths = {name: one["layers"] for name, one in read_values("frozen_layers")["models"].items()}
    lines = []
    for (model, frozen, dropped), by_visit in arms.items():
        times = [f"{by_visit[v]['time_ratio']:.3f}" if v in by_visit else "–" for v in VISITS]
        one = by_visit["no cache"]
        part = f"{frozen} of {depths[model]}"
        shares = (f"{one['limit']:.3f}", f"{one['stored_ratio']:.3f}")
        lines.append((model, part, str(dropped), *times, *shares))
    columns = (
        *(
            "model",
            "frozen",
            "others dropped",
            *VISITS.values(),
            "layers that run",
            "stored for the backward",
        ),
    )
    return markdown_table(columns, lines)


def matrix_kernels() -> str:
    """Speed of matrix products and of training, with MKL's kernels for two makers."""
    content = read_values("matrix_kernels")
    runs: Mapping[str, Sequence[Row]] = content["runs"]
    shapes = [f"({n}, {inner}) x ({inner}, {out})" for n, inner, out in content["shapes"]]
    lines = []
    for name, found in runs.items():
        speeds = zip(*(one["gflops"] for one in found), strict=True)
        seconds = [one["training_s"] for one in found]
        shown = [f"{median(speed):.0f} ({max(speed):.0f})" for speed in speeds]
        lines.append((name, *shown, f"{median(seconds):.2f} s ({min(seconds):.2f})"))
    return markdown_table(("kernels", *shapes, "training"), lines)
