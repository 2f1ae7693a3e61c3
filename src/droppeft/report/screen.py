"""Listeners that print a run: for a terminal or a file, as one line, or as JSON."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import TaskID
from rich.text import Text

from droppeft.files import as_json
from droppeft.quantities import about_minutes, counted, seconds_text
from droppeft.report.closing import closing, layers_above_the_frozen
from droppeft.report.opening import opening
from droppeft.report.progress import bar
from droppeft.tasks.metrics import Metric, primary_metric

if TYPE_CHECKING:
    from droppeft.messages.reply import Reply
    from droppeft.runs.ledger import RoundRow

BAR_WIDTH = 18


class Screen:
    """A listener that prints a run; use it as a context manager around the run.

    Args:
        console: where it prints; with a terminal it also shows progress bars.
        folder: of the run; ``None`` for other commands, which only show their steps.
        commands: whether to end with what to type next.
    """

    def __init__(
        self, console: Console | None = None, folder: Path | None = None, *, commands: bool = True
    ) -> None:
        self.console = console or Console()
        self._folder = folder
        self._commands = commands
        self._progress = bar(self.console)
        self._status = self.console.status("")
        self._rounds: TaskID | None = None
        self._clients: TaskID | None = None
        self._about: Mapping[str, Any] = {}
        self._best_arm: int | None = None
        self._measured = False

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()
        self._progress.stop()

    def preparing(self, what: str) -> None:
        """Show a step outside the rounds; of a run without a terminal, as a line."""
        self._progress.stop()
        if self.console.is_terminal:
            self._status.update(f"{what} …")
            self._status.start()
        elif self._folder is not None:
            self.console.print(Text(f"{what} …"))

    def started(self, about: Mapping[str, Any], rows: "list[RoundRow]") -> None:
        """Show what will happen, and the rounds that an earlier process finished."""
        self._status.stop()
        self._about = about
        self.console.print(opening(about, self._folder))
        self.console.print()
        if rows:
            self.console.print(Text(f"continuing after round {rows[-1].round}", style="yellow"))
        self._rounds = self._progress.add_task(
            "rounds ", total=about["planned_rounds"], completed=len(rows)
        )
        self._clients = self._progress.add_task("clients", total=about["drawn_size"])
        self.console.print(_round_head(about))
        self._progress.start()

    def replied(self, reply: "Reply") -> None:
        """Advance the bar of the current round."""
        if self._clients is not None:
            self._progress.advance(self._clients)

    def round_done(self, row: "RoundRow") -> None:
        """Print the round's line, who was left out, and the configurator's choice."""
        if self._rounds is None or self._clients is None:
            return
        self.console.print(_round_line(row, self._about))
        for line in left_out(row):
            self.console.print(line)
        self._show_arms(row)
        self._progress.advance(self._rounds)
        self._progress.reset(self._clients)
        self._show_time_left(row)

    def finished(self, result: Mapping[str, Any]) -> None:
        """Print the table, the conclusion and the next commands."""
        self._status.stop()
        self._progress.stop()
        self.console.print(closing(result, self._folder, commands=self._commands))

    def _show_arms(self, row: "RoundRow") -> None:
        """Print the configurator's choice, if the best arm is another one than before."""
        best = (row.notes or {}).get("best")
        if best is not None and best != self._best_arm:
            self._best_arm = best
            self.console.print(Padding(_arms(row, self._about), (0, 0, 0, 9)))

    def _show_time_left(self, row: "RoundRow") -> None:
        """After the first round, print what a progress bar would show if there were one."""
        left = self._about["planned_rounds"] - row.round
        if left and not self._measured and not self.console.is_terminal:
            text = f"{counted(left, 'round')} left, {about_minutes(left * row.host_wall_s)}"
            self.console.print(Padding(Text(text, style="dim"), (0, 0, 0, 9)))
        self._measured = True


class Quiet:
    """A listener that prints one line at the end."""

    def preparing(self, what: str) -> None:
        """Nothing."""

    def started(self, about: Mapping[str, Any], rows: "list[RoundRow]") -> None:
        """Nothing."""

    def replied(self, reply: "Reply") -> None:
        """Nothing."""

    def round_done(self, row: "RoundRow") -> None:
        """Nothing."""

    def finished(self, result: Mapping[str, Any]) -> None:
        """Print the primary metric of the global model and of the clients' models."""
        print(quality_line(result))


class JsonLines(Quiet):
    """A listener that prints a JSON object per round, and one for the result."""

    def round_done(self, row: "RoundRow") -> None:
        """Print the row as in ``rounds.jsonl``."""
        self._print({"event": "round", **row.as_columns()})

    def finished(self, result: Mapping[str, Any]) -> None:
        """Print the content of ``result.json``."""
        self._print({"event": "result", **result})

    def _print(self, content: Mapping[str, Any]) -> None:
        sys.stdout.write(as_json(content) + "\n")
        sys.stdout.flush()


def quality_line(result: Mapping[str, Any]) -> str:
    """The primary metric of the global model and of the clients' models, as far as known."""
    metric = primary_metric(result)
    values = {
        metric.label: result[metric.key("global")],
        "personalised": result[metric.key("personalised")],
    }
    known = {name: value for name, value in values.items() if value is not None}
    return ", ".join(f"{name} {value:.4f}" for name, value in known.items())


def _round_head(about: Mapping[str, Any]) -> Text:
    """The headings of :func:`_round_line`."""
    indent = " " * len(_round_name(about["planned_rounds"], about))
    last = "modelled" if about["privacy"] is None else "epsilon"
    columns = f"{'train loss':>12}{'depth':>10}{'measured':>12}{last:>12}"
    metric = primary_metric(about)
    return Text(f"{indent}{metric.label:<{_width(metric) + BAR_WIDTH}}{columns}", style="dim")


def _round_name(round: int, about: Mapping[str, Any]) -> str:
    return f"round {round:>{len(str(about['planned_rounds']))}}  "


def _round_line(row: "RoundRow", about: Mapping[str, Any]) -> Text:
    line = Text(_round_name(row.round, about))
    metric = primary_metric(about)
    value = row.quality[metric.key("global")]
    line.append(f"{metric.text(value):<{_width(metric)}}", style="bold green")
    filled = 0 if value is None else round(_part(value, metric, about) * BAR_WIDTH)
    line.append("━" * filled, style="green")
    line.append((" " if value is None else "─") * (BAR_WIDTH - filled), style="bright_black")
    loss = "–" if row.train_loss is None else f"{row.train_loss:.3f}"
    depth = "–" if row.mean_active_layers is None else f"{row.mean_active_layers:.2f}"
    line.append(f"{loss:>12}{depth + '/' + str(layers_above_the_frozen(about)):>10}")
    last = seconds_text(row.round_modelled_s) if row.epsilon is None else f"{row.epsilon:.3f}"
    line.append(f"{seconds_text(row.host_wall_s):>12}{last:>12}")
    return line


def _width(metric: Metric) -> int:
    """Characters of a value and the space after it."""
    return 5 if metric.most == 1 else 7


def _part(value: float, metric: Metric, about: Mapping[str, Any]) -> float:
    """The length of a bar: the value, or its part of the value at the start if it has no bound."""
    most = metric.most if isfinite(metric.most) else about[metric.key("initial")]
    return min(max(value / most, 0.0), 1.0) if isfinite(value) and most > 0 else 0.0


def left_out(row: "RoundRow") -> Iterator[Text]:
    """Yield lines about clients whose update was not merged as it was, and about divergence."""
    indent = " " * 9
    for failure in row.failures:
        yield Text(f"{indent}client {failure['client']}: {failure['reason']}", style="red")
    if row.diverged:
        yield Text(
            f"{indent}the loss of the merged model is not finite, and it was not kept; if this "
            "happens again, stop the run and lower training.learning_rate",
            style="red",
        )
    bounds = {
        "changes clipped of": row.clipped,
        "weights limited of": row.limited,
        "left out by server.direction_check:": row.opposed,
        "set aside by server.merge:": row.set_aside,
    }
    found = [f"{what} {_clients(who)}" for what, who in bounds.items() if who]
    if found:
        yield Text(
            f"{indent}{'; '.join(found)}", style="yellow" if row.clipped or row.opposed else "dim"
        )
    groups = {"absent": row.absent, "late": row.late, "surplus": row.surplus}
    named = [f"{name} {', '.join(map(str, who))}" for name, who in groups.items() if who]
    if named:
        yield Text(f"{indent}on the modelled clock: {'; '.join(named)}", style="dim")


def _clients(numbers: Sequence[int]) -> str:
    return f"client{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _arms(row: "RoundRow", about: Mapping[str, Any]) -> Text:
    """Which layers the configurator had the clients of a round train, and what is best so far.

    The best arm may be one that was not tried lately: its expected reward may be the highest.
    """
    notes = row.notes or {}
    counts = Counter(str(number) for number in notes["chosen"].values())
    chosen = "; ".join(
        f"{notes['labels'][arm]} by {counted(count, 'client')}"
        for arm, count in counts.most_common()
    )
    frozen = about["config"]["frozen"]["layers"]
    above = f" above {counted(frozen, 'frozen layer')}" if frozen else ""
    if notes.get("layer_values"):
        from droppeft.runs.conclusion import worth_of_upper_half

        share = worth_of_upper_half(notes["layer_values"])
        worth = f"training the upper half is worth {share:.0%} of training all layers"
        return Text(f"trained{above}: {chosen} ({worth})", style="dim")
    best = notes["labels"][str(notes["best"])]
    trials = notes["trials"][notes["present"].index(notes["best"])]
    status = "best so far" if trials else "expected to be best, but not tried lately"
    return Text(f"trained{above}: {chosen} ({status}: {best})", style="dim")
