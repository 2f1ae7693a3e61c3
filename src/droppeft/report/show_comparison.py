"""``droppeft compare`` on the terminal: a line per run, how long it will take, tables."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from droppeft.comparison.grid import Cell
from droppeft.comparison.study_files import RunRecord
from droppeft.comparison.summary import Part
from droppeft.comparison.writers import (
    COLUMNS,
    COSTS,
    QUALITY,
    TIMES,
    failures,
    heading,
    notes,
)
from droppeft.messages import Reply
from droppeft.report.screen import accuracy_line, bar
from droppeft.runs.ledger import RoundRow
from droppeft.runs.listener import Listener


class Lines:
    """Says of each run how it ended, and after the first how long the others will take."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._number = self._of = 0
        self._walls: list[float] = []
        self._run = _Run(console, "")

    def begins(self, cell: Cell, number: int, of: int) -> Listener:
        """A bar of this run's rounds."""
        self._number, self._of = number, of
        self._run = _Run(self._console, f"{number}/{of} {_name(cell)}")
        return self._run

    def done(self, records: RunRecord, wall_s: float | None) -> None:
        """The run's line."""
        self._run.close()
        line = Text(f"{self._number:>3}/{self._of} {_name(records):<40} ")
        if records.result is None:
            line.append(f"failed: {records.failure}", style="red")
        else:
            line.append(accuracy_line(records.result), style="bold green")
            line.append(" done before" if wall_s is None else f" in {wall_s:.0f} s", style="dim")
        self._console.print(line, soft_wrap=True)
        if wall_s is not None and records.result is not None:
            self._walls.append(wall_s)
            self._estimate()

    def close(self) -> None:
        """Take the bar away, whatever happened."""
        self._run.close()

    def _estimate(self) -> None:
        """Once, after the first run: what is left, if the others are like it."""
        left = self._of - self._number
        if len(self._walls) == 1 and left:
            minutes = max(1, round(left * self._walls[0] / 60))
            runs, they = ("run", "it is") if left == 1 else ("runs", "they are")
            time = f"{minutes} minute{'s' * (minutes > 1)}"
            text = f"{left} {runs} to go: about {time} if {they} like the first"
            self._console.print(Text(text, style="yellow"))


class _Run:
    """Watches one run."""

    def __init__(self, console: Console, name: str) -> None:
        self._progress = bar(console)
        self._name = name
        self._task = self._progress.add_task(name, total=None)

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def preparing(self, what: str) -> None:
        """A step before round 1."""
        self._progress.start()
        self._progress.update(self._task, description=f"{self._name}: {what}")

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """The bar's length is known."""
        self._progress.update(
            self._task, description=self._name, total=about["planned_rounds"], completed=len(rows)
        )

    def replied(self, reply: Reply) -> None:
        """Nothing: rounds are what is counted here."""

    def round_done(self, row: RoundRow) -> None:
        """One round less."""
        self._progress.advance(self._task)

    def finished(self, result: Mapping[str, Any]) -> None:
        """Nothing: the line comes with the comparison."""


def show(parts: Sequence[Part], console: Console) -> None:
    """A table per data set and model."""
    for part in parts:
        console.print(Text(heading(part), style="bold"))
        for columns in (QUALITY, TIMES, COSTS):
            if part.target is not None or "speed-up" not in columns:
                console.print(_table(part, columns))
        for line in notes(part):
            console.print(Text(line, style="dim"))
        for line in failures(part):
            console.print(Text(line, style="red"))
    note = "modelled: on the clients' profiles; measured (m.): here, clients side by side"
    console.print(Text(note, style="dim"))


def _table(part: Part, columns: Sequence[str]) -> Table:
    """On a narrow screen the headings take several lines, and not the numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        longest = max(len(COLUMNS[name](row)) for row in part.rows)
        justify: Literal["left", "right"] = "left" if name == "member" else "right"
        table.add_column(name, justify=justify, min_width=longest)
    for row in part.rows:
        table.add_row(*(Text(COLUMNS[name](row)) for name in columns))
    return table


def _name(one: Cell | RunRecord) -> str:
    return f"{one.variant}, seed {one.seed}"
