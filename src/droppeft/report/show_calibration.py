"""What ``droppeft calibrate`` prints and writes: progress, a table, drop rates, JSON, a figure."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from droppeft.config import Config, as_tree
from droppeft.layer_dropout import Calibration
from droppeft.layer_dropout.calibration import EXPENSIVE, expensive_layers, typical_loss
from droppeft.quantities import counted, percent, seconds_text, share
from droppeft.report.calibration_figure import figure_of_result
from droppeft.report.drawing import svg
from droppeft.report.measurement_files import write_measurement
from droppeft.report.progress import bar
from droppeft.resources.calibration import measure
from droppeft.runs.environment import machine, versions

SCHEMA_VERSION = 1
NAME = "calibration"
"""Of the files in ``--out``."""

BAR = 12
"""Characters of the longest bar."""

NAMED = 10
"""Most layers that a sentence names."""


def run_calibration(
    config: Config, words: Sequence[str], rows: int | None, mean: float, console: Console
) -> dict[str, Any]:
    """Measure, with a progress bar if ``console`` is a terminal; return the content of the JSON.

    Args:
        config: of a run with these settings.
        words: the settings as ``key=value``.
        rows: number of training rows; ``None`` for the task's.
        mean: of the drop rates.
        console: shows progress.

    Raises:
        DroppeftError: as :func:`~droppeft.resources.calibration.measure`.
    """
    with bar(console) as progress:
        task = progress.add_task("", total=None)
        resolved, found = measure(
            config,
            rows,
            lambda what: progress.update(task, description=what),
            lambda done, of: progress.update(task, completed=done, total=of),
        )
    return content(resolved, words, mean, found)


def content(
    config: Config, words: Sequence[str], mean: float, found: Calibration
) -> dict[str, Any]:
    """What was measured, and the drop rates that follow, as plain values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": " ".join(["droppeft", *sys.argv[1:]]),
        "settings": list(words),
        **asdict(found),
        "mean": mean,
        "rates": found.rates(mean),
        "config": as_tree(config),
        "versions": versions(),
        "machine": machine(config.accelerator),
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the table, what it says, and the settings of a run that uses it."""
    config = result["config"]
    training = config["training"]
    title = (
        f"{config['model']} · {config['adapter']['type']} · {training['precision']} · "
        f"{_rows(result)} · loss {result['loss']:.3f}"
    )
    console.print(_table(result, title))
    for sentence in sentences(result):
        console.print(sentence, highlight=False)
    console.print(Text(f"\na run with a mean drop rate of {result['mean']:.3g}:", style="bold"))
    console.print(Text(command(result)), soft_wrap=True, style="cyan", highlight=False)


def _rows(result: Mapping[str, Any]) -> str:
    rows, targets = result["rows"], result["targets"]
    learnt = "" if rows == targets else f", {counted(targets, 'token')} learnt"
    return f"{counted(rows, 'row')}{learnt}"


def _table(result: Mapping[str, Any], title: str) -> Table:
    added, error = result["added_loss"], result["added_loss_error"]
    total = sum(result["gradient"]) or 1.0
    shares = [one / total for one in result["gradient"]]
    expensive, limit = _expensive(result)
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for name in ("layer", "added loss", "±", "", "gradient", "", "drop rate"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for layer, rate in enumerate(result["rates"]):
        marked = layer in expensive
        table.add_row(
            str(layer),
            f"{added[layer]:.3f}",
            f"{error[layer]:.3f}",
            _bar(added[layer], limit or max(added), "yellow" if marked else "green"),
            percent(shares[layer]),
            _bar(shares[layer], max(shares), "blue"),
            share(rate) if rate else "never",
        )
    return table


def _bar(value: float, longest: float, colour: str) -> Text:
    part = min(max(value / longest, 0.0), 1.0) if longest > 0 else 0.0
    return Text("━" * round(part * BAR), style=colour)


def _expensive(result: Mapping[str, Any]) -> tuple[frozenset[int], float]:
    """The expensive layers, and the added loss from which on a layer is one."""
    values = result["added_loss"], result["added_loss_error"]
    return expensive_layers(*values), EXPENSIVE * typical_loss(*values)


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Say which layers are expensive to skip and which are not, and how it was measured."""
    added = result["added_loss"]
    expensive, limit = _expensive(result)
    typical = limit / EXPENSIVE
    order = sorted(range(len(added)), key=lambda layer: added[layer], reverse=True)
    if expensive:
        named = [f"{layer} (+{added[layer]:.2f})" for layer in order[: len(expensive)]]
        one = len(named) == 1
        found = (
            f"Expensive to skip: {'layer' if one else 'layers'} {_listed(named)}. "
            f"{'It adds' if one else 'Each adds'} more than {EXPENSIVE} times the typical "
            f"{typical:.3f} nats (a full bar)."
        )
    else:
        found = (
            f"No layer is expensive to skip: none adds more than {EXPENSIVE} times the typical "
            f"{typical:.3f} nats (a full bar). The most: layers "
            f"{_listed([f'{layer} (+{added[layer]:.3f})' for layer in order[:3]])}."
        )
    head = (
        f"; a head was trained on {result['head_rows']} others first" if result["head_rows"] else ""
    )
    how = (
        f"added loss: mean loss with this layer alone skipped, minus {result['loss']:.3f} of "
        f"the full model, ± its standard error{head}. gradient: share of the absolute gradients "
        f"of all adapters. Measured in {seconds_text(result['calibration_wall_s'])}."
    )
    return [found, f"[dim]{how}[/dim]"]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def command(result: Mapping[str, Any]) -> str:
    """The command of a run that drops layers with these rates."""
    rates = ",".join(f"{rate:.3f}".rstrip("0").rstrip(".") for rate in result["rates"])
    words = ["method=droppeft", *result["settings"], f"dropout.rates=[{rates}]"]
    return f"  droppeft run {shlex.join(words)}"


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Write JSON and figure; see :func:`write_measurement`."""

    def draw(path: Path) -> None:
        figure = figure_of_result(result)
        figure.savefig(path.with_suffix(".png"), dpi=150, facecolor="white")
        path.with_suffix(".svg").write_text(svg(figure), encoding="utf-8")

    write_measurement(result, folder, NAME, draw)
