"""A progress bar with rate and remaining time."""

import importlib.util

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def bar(console: Console) -> Progress:
    """A progress bar with rate and remaining time, not started.

    It is disabled without a terminal, unless in a notebook with ipywidgets.
    """
    in_notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal or in_notebook),
    )


class Rate(ProgressColumn):
    """Finished items per minute."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("  –/min", style="dim")
        return Text(f"{60 * task.speed:.1f}/min", style="dim")
