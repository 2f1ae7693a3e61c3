"""What ``droppeft compare`` prints: a line per run, the remaining time, tables."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from droppeft.comparison.answer import answer
from droppeft.comparison.grid import Cell
from droppeft.comparison.study_files import RunRecord
from droppeft.comparison.summary import Part
from droppeft.comparison.writers import (
    COLUMNS,
    COSTS,
    QUALITY,
    TEXTS,
    TIMES,
    failures,
    head,
    heading,
    known_columns,
    references,
)
from droppeft.messages.reply import Reply
from droppeft.quantities import counted
from droppeft.report.progress import bar
from droppeft.report.screen import quality_line
from droppeft.runs.ledger import RoundRow
from droppeft.runs.listener import Listener


class Lines:
    """Prints how each run ended and, after the first one, how long the others will take."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._number = self._of = 0
        self._walls: list[float] = []
        self._run = _Run(console, "")

    def begins(self, cell: Cell, number: int, of: int) -> Listener:
        """Start a progress bar for the run's rounds."""
        self._number, self._of = number, of
        self._run = _Run(self._console, f"{number}/{of} {_name(cell)}")
        return self._run

    def done(self, record: RunRecord, wall_s: float | None) -> None:
        """Print the run's line."""
        self._run.close()
        line = Text(f"{self._number:>3}/{self._of} {_name(record):<40} ")
        if record.result is None:
            line.append(f"failed: {record.failure}", style="red")
        else:
            line.append(quality_line(record.result), style="bold green")
            line.append(" done before" if wall_s is None else f" in {wall_s:.0f} s", style="dim")
        self._console.print(line, soft_wrap=True)
        if wall_s is not None and record.result is not None:
            self._walls.append(wall_s)
            self._estimate()

    def close(self) -> None:
        """Remove the progress bar."""
        self._run.close()

    def _estimate(self) -> None:
        """After the first run, print the remaining time if the others take as long."""
        left = self._of - self._number
        if len(self._walls) == 1 and left:
            minutes = counted(max(1, round(left * self._walls[0] / 60)), "minute")
            they = "it is" if left == 1 else "they are"
            text = f"{counted(left, 'run')} to go: about {minutes} if {they} like the first"
            self._console.print(Text(text, style="yellow"))


class _Run:
    """The listener of one run, with a progress bar."""

    def __init__(self, console: Console, name: str) -> None:
        self._progress = bar(console)
        self._name = name
        self._task = self._progress.add_task(name, total=None)

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()

    def preparing(self, what: str) -> None:
        """Show a step before round 1."""
        self._progress.start()
        self._progress.update(self._task, description=f"{self._name}: {what}")

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """Set the bar's length."""
        self._progress.update(
            self._task, description=self._name, total=about["planned_rounds"], completed=len(rows)
        )

    def replied(self, reply: Reply) -> None:
        """Nothing: the bar counts rounds."""

    def round_done(self, row: RoundRow) -> None:
        """Advance the bar."""
        self._progress.advance(self._task)

    def finished(self, result: Mapping[str, Any]) -> None:
        """Nothing: :class:`Lines` prints the result."""


def show(parts: Sequence[Part], console: Console) -> None:
    """Print the answer and tables for each data set and model."""
    for part in parts:
        console.print(Text(heading(part), style="bold"))
        for sentence in answer(part):
            console.print(Text(sentence))
        for columns in (QUALITY, TEXTS, TIMES, COSTS):
            known = known_columns(part, columns)
            if len(known) > 1 and (part.target is not None or columns != TIMES):
                console.print(_table(part, known))
        for line in references(part):
            console.print(Text(line, style="dim"))
        for line in failures(part):
            console.print(Text(line, style="red"))
    note = "modelled: on device profiles; measured (m.): on this machine; clients in parallel"
    console.print(Text(note, style="dim"))


def _table(part: Part, columns: Sequence[str]) -> Table:
    """A table whose headings are wrapped on a narrow terminal, but not its values."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        longest = max(len(COLUMNS[name](row)) for row in part.rows)
        justify: Literal["left", "right"] = "left" if name == "variant" else "right"
        table.add_column(head(name, part), justify=justify, min_width=longest)
    for row in part.rows:
        table.add_row(*(Text(COLUMNS[name](row)) for name in columns))
    return table


def _name(one: Cell | RunRecord) -> str:
    return f"{one.variant}, seed {one.seed}"
