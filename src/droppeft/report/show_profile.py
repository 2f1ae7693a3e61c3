"""What ``droppeft profile`` prints and writes: progress, a table, JSON, a figure."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from droppeft.config import Config, as_tree, resolve_layers
from droppeft.models.sources import find_source
from droppeft.quantities import bytes_text
from droppeft.report.measurement_files import write_measurement
from droppeft.report.progress import bar
from droppeft.report.screen import Screen
from droppeft.resources.model_shape import model_shape
from droppeft.resources.profiling import RateProfile, profile
from droppeft.runs.environment import machine, versions

SCHEMA_VERSION = 1
NAME = "profile"
"""Of the files in ``--out``."""


def run_profile(
    config: Config, rates: Sequence[float], repeats: int, steps: int, console: Console
) -> dict[str, Any]:
    """Measure, with a progress bar if ``console`` is a terminal; return the content of the JSON."""
    with Screen(console) as screen:
        find_source(config.model).convert(screen.preparing)
    config = resolve_layers(config, model_shape(config.model, config.task).num_layers)
    total = len(rates) * (repeats + 1)
    with bar(console) as progress:
        task = progress.add_task("profile runs, each in a fresh process", total=total)
        measured = profile(config, rates, repeats, steps, lambda: progress.advance(task))
    return content(config, measured, steps)


def content(config: Config, measured: Sequence[RateProfile], steps: int) -> dict[str, Any]:
    """All measurements as plain values, including those of single profile runs."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": " ".join(["droppeft", *sys.argv[1:]]),
        "steps_per_run": steps,
        "num_layers": model_shape(config.model, config.task).num_layers,
        "rates": [_row(one) for one in measured],
        "config": as_tree(config),
        "versions": versions(),
        "machine": machine(config.accelerator),
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the table and explain its columns."""
    config, rows = result["config"], result["rates"]
    training = config["training"]
    title = (
        f"{config['model']} · {config['adapter']['type']} · batch {training['batch_size']} x "
        f"{training['max_length']} tokens · {training['precision']} · measured on "
        f"{config['accelerator']}"
    )
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    energy = any(row["step_j"] is not None for row in rows)
    names = ["rate", "trained", "step", "quartiles", "stored", "peak used", "peak resident"]
    for name in (*names, *(["energy"] if energy else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, result["num_layers"]), *([_joules(row)] if energy else []))
    console.print(table)
    note = _note(rows, config["accelerator"])
    reported = "" if energy else " energy: not reported by this hardware."
    console.print(f"trained: in a step. {note}{reported}", style="dim", highlight=False)


def _cells(row: Mapping[str, Any], layers: int) -> list[str]:
    low, high = row["step_quartiles_s"]
    return [
        f"{row['rate']:g}",
        f"{row['trained']:.2f}/{layers}",
        f"{row['step_s']:.3f} s",
        f"{low:.3f}–{high:.3f}",
        bytes_text(row["activation_bytes_peak"]),
        bytes_text(row["used_bytes"]),
        bytes_text(row["resident_bytes"]),
    ]


def _joules(row: Mapping[str, Any]) -> str:
    return "–" if row["step_j"] is None else f"{row['step_j']:.2f} J"


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Write JSON and figure; see :func:`write_measurement`."""
    write_measurement(result, folder, NAME, partial(draw, result))


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw step time and stored bytes against the rate, relative to those at the smallest rate.

    The ideal line is the share of layers that run: the cost if nothing else took time or memory.

    Args:
        path: without ``.png`` and ``.svg``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = sorted(result["rates"], key=lambda row: row["rate"])
    rates, first = [row["rate"] for row in rows], rows[0]
    with mpl.rc_context({"svg.hashsalt": "droppeft"}):
        figure = Figure(figsize=(5.5, 4), layout="constrained")
        axis = figure.subplots()
        ideal = [(1 - rate) / (1 - rates[0]) if rates[0] < 1 else 1.0 for rate in rates]
        axis.plot(rates, ideal, color="black", linestyle=":", label="ideal, 1 − rate")
        low, high = zip(*(row["step_quartiles_s"] for row in rows), strict=True)
        times = [row["step_s"] for row in rows]
        spread = [
            [(t - q) / first["step_s"] for t, q in zip(times, low, strict=True)],
            [(q - t) / first["step_s"] for t, q in zip(times, high, strict=True)],
        ]
        axis.errorbar(
            rates,
            [time / first["step_s"] for time in times],
            yerr=spread,
            color="#d1495b",
            marker="s",
            capsize=3,
            label="step time (median, quartiles)",
        )
        stored = [row["activation_bytes_peak"] / first["activation_bytes_peak"] for row in rows]
        axis.plot(rates, stored, color="#00798c", marker="o", label="stored activations")
        axis.set(xlabel="mean drop rate", ylabel=f"relative to rate {rates[0]:g}", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
        figure.suptitle(f"{Path(result['config']['model']).name}, measured")
        figure.savefig(path.with_suffix(".png"), dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _row(one: RateProfile) -> dict[str, Any]:
    return {
        "rate": one.rate,
        "trained": one.trained,
        "step_s": one.step_s,
        "step_quartiles_s": list(one.step_quartiles_s),
        "activation_bytes_peak": one.activation_bytes_peak,
        "used_bytes": one.used_bytes,
        "resident_bytes": one.resident_bytes,
        "process_bytes": one.memory_run.process_bytes,
        "step_j": one.step_j,
        "timed_runs": [asdict(run) for run in one.timed_runs],
        "memory_run": asdict(one.memory_run),
    }


def _note(rows: Sequence[Mapping[str, Any]], accelerator: str) -> str:
    if accelerator == "cuda":
        return "peak: most memory that torch had on the device; the CUDA context is not included."
    process = bytes_text(rows[0]["process_bytes"])
    note = (
        f"peak: of the whole process, of which {process} are libraries; used: freed memory is "
        "returned at once, and weights are not in a mapped file; resident: as in a run."
    )
    loading = any(row["memory_run"]["with_loading"] for row in rows)
    return f"{note} Both include loading the model." if loading else note
