"""Show a run on the terminal: header, progress bars, a line per round, and a closing table."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from droppeft.messages import Reply
from droppeft.runs.ledger import RoundRow

BAR_WIDTH = 18


class Screen:
    """A listener that shows a run on a terminal; use it as a context manager around the run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress = bar(self.console)
        self._status = self.console.status("")
        self._rounds: TaskID | None = None
        self._clients: TaskID | None = None
        self._about: Mapping[str, Any] = {}

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
        """Show a step outside the rounds."""
        self._progress.stop()
        if self.console.is_terminal:
            self._status.update(f"{what} …")
            self._status.start()

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """Show the header, and the rounds that an earlier process finished."""
        self._status.stop()
        self._about = about
        self.console.print(_header(about))
        if rows:
            self.console.print(Text(f"continuing after round {rows[-1].round}", style="yellow"))
        self._rounds = self._progress.add_task(
            "rounds ", total=about["planned_rounds"], completed=len(rows)
        )
        self._clients = self._progress.add_task("clients", total=about["drawn_size"])
        self.console.print(_round_head(about))
        self._progress.start()

    def replied(self, reply: Reply) -> None:
        """Advance the bar of the current round."""
        if self._clients is not None:
            self._progress.advance(self._clients)

    def round_done(self, row: RoundRow) -> None:
        """Print the round's line, who was left out, and the configurator's choice."""
        if self._rounds is None or self._clients is None:
            return
        self.console.print(_round_line(row, self._about))
        for line in _left_out(row):
            self.console.print(line)
        for line in _arms(row, self._about):
            self.console.print(Padding(line, (0, 0, 0, 9)))
        self._progress.advance(self._rounds)
        self._progress.reset(self._clients)

    def finished(self, result: Mapping[str, Any]) -> None:
        """Print the closing table."""
        self._status.stop()
        self._progress.stop()
        self.console.print(closing_table(result))


class Quiet:
    """A listener that prints one line at the end."""

    def preparing(self, what: str) -> None:
        """Nothing."""

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """Nothing."""

    def replied(self, reply: Reply) -> None:
        """Nothing."""

    def round_done(self, row: RoundRow) -> None:
        """Nothing."""

    def finished(self, result: Mapping[str, Any]) -> None:
        """Print the accuracies."""
        print(accuracy_line(result))


class JsonLines(Quiet):
    """A listener that prints a JSON object per round, and one for the result."""

    def round_done(self, row: RoundRow) -> None:
        """Print the row as in ``rounds.jsonl``."""
        self._print({"event": "round", **asdict(row)})

    def finished(self, result: Mapping[str, Any]) -> None:
        """Print the content of ``result.json``."""
        self._print({"event": "result", **result})

    def _print(self, content: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()


def closing_table(result: Mapping[str, Any]) -> Table:
    """The result as a table: accuracies and their references, then costs."""
    table = Table(box=box.SIMPLE_HEAD, title="Result", title_justify="left", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value", justify="right")
    table.add_column("note", style="dim")
    for what, value, note in (*_quality_lines(result), *_cost_lines(result)):
        table.add_row(what, value, note)
    return table


def _quality_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    sample = f"on {result['sampled_test_rows']:,} test texts"
    lines = [
        *_global_lines(result, sample),
        *_personalised_lines(result),
        ("before training", _percent(result["initial_accuracy"]), sample),
        ("majority class", _percent(result["majority_accuracy"]), "reference"),
        (
            "TF-IDF + linear SVM",
            _percent(result["tfidf_accuracy"]),
            "reference, all data in one place",
        ),
    ]
    if result["target"] is not None:
        lines += _target_lines(result)
    return lines


def _global_lines(result: Mapping[str, Any], sample: str) -> list[tuple[str, str, str]]:
    if result["global_accuracy"] is None:
        return [("accuracy", "–", "there is no global model")]
    return [
        (
            "accuracy",
            _percent(result["global_accuracy"]),
            f"all {result['test_rows']:,} test texts",
        ),
        ("F1", _percent(result["global_f1"]), _f1_note(result)),
        ("after round 1", _percent(result["first_accuracy"]), sample),
        ("best", _percent(result["best_accuracy"]), f"round {result['best_round']}, {sample}"),
    ]


def _f1_note(result: Mapping[str, Any]) -> str:
    """Which F1 score it is."""
    return "of class 1" if result["classes"] == 2 else "mean over classes (macro)"


def _personalised_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Accuracy of clients' own models; no lines if the run did not evaluate them."""
    if result["personalised_accuracy"] is None:
        return []
    clients, rows = result["personalised_clients"], result["personalised_rows"]
    note = f"mean of {clients:,} clients' own models on their own {rows:,} test texts"
    tenth = max(1, -(-clients // 10))
    of_them = f"of them: {tenth} client{'s' * (tenth > 1)}"
    failed = result["personalised_failures"]
    if failed:
        note += f"; {len(failed)} could not be evaluated ({failed[0]['reason']})"
    if lost := result["personalised_lost"]:
        note += f"; {len(lost)} had lost their client state and used the global model"
    return [
        ("personalised", _percent(result["personalised_accuracy"]), note),
        ("worst tenth", _percent(result["personalised_worst_tenth"]), of_them),
        ("deviation", _percent(result["personalised_deviation"]), "between them"),
        (
            "own majority class",
            _percent(result["own_majority_accuracy"]),
            "reference: always predict the client's most frequent class",
        ),
    ]


def accuracy_line(result: Mapping[str, Any]) -> str:
    """Global and personalised accuracy, as far as there are any."""
    accuracies = {
        "accuracy": result["global_accuracy"],
        "personalised": result["personalised_accuracy"],
    }
    known = {name: value for name, value in accuracies.items() if value is not None}
    return ", ".join(f"{name} {value:.4f}" for name, value in known.items())


def _target_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    name = f"target {_percent(result['target'])}"
    if result["target_round"] is None:
        return [(name, "not reached", "")]
    here, modelled = (result[f"time_to_target_{clock}_s"] for clock in ("measured", "modelled"))
    note = f"round {result['target_round']}; as if clients ran in parallel (measured)"
    return [(name, _seconds(here), note), ("", _seconds(modelled), "on their profiles (modelled)")]


def _cost_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rounds, layers = result["rounds"], _not_frozen(result)
    depth = result["mean_active_layers"]
    above = "" if layers == result["num_layers"] else " above the frozen ones"
    return [
        ("time", _seconds(result["host_wall_s"]), f"{rounds} rounds on this machine (measured)"),
        ("training time", _seconds(result["train_wall_s"]), "all clients one after another"),
        (
            "modelled time",
            _seconds(result["round_modelled_s"]),
            "as if clients ran in parallel, on their profiles",
        ),
        ("energy", _joules(result["energy_modelled_j"]), "all clients (modelled)"),
        ("upload", bytes_text(result["upload_bytes"]), "all clients, all rounds"),
        ("download", bytes_text(result["download_bytes"]), "all clients, all rounds"),
        (
            "mean depth",
            "–" if depth is None else f"{depth:.2f}",
            f"of {layers} layers{above} per step",
        ),
        ("activations", bytes_text(result["activation_bytes_peak"]), "peak stored for backward"),
    ]


def _header(about: Mapping[str, Any]) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan")
    grid.add_column()
    grid.add_row(
        "model",
        f"{about['model']}: {about['num_layers']} layers, "
        f"{about['trainable_parameters']:,} trainable parameters",
    )
    grid.add_row(
        "data", f"{about['data']}: {about['train_rows']:,} texts, {about['classes']} classes"
    )
    drawn = about["drawn_size"]
    of_drawn = f" (the first of {drawn})" if drawn > about["cohort_size"] else ""
    grid.add_row(
        "clients",
        f"{about['clients']}, {about['cohort_size']} per round{of_drawn}, "
        f"{about['planned_rounds']} rounds",
    )
    if sharing := _shared(about["config"]["sharing"]):
        grid.add_row("sharing", sharing)
    modelled = about["no_clock_reason"] or f"{', '.join(about['profiles'])} (modelled)"
    grid.add_row("profiles", modelled)
    grid.add_row(
        "references",
        f"majority class {_percent(about['majority_accuracy'])}, "
        f"TF-IDF + linear SVM {_percent(about['tfidf_accuracy'])}",
    )
    title = f"[bold]droppeft[/] · {about['method']} · seed {about['seed']}"
    return Panel(grid, title=title, title_align="left", box=box.ROUNDED, expand=False)


def _shared(sharing: Mapping[str, Any]) -> str:
    """What clients share, if it is not everything."""
    parts = []
    if sharing["fraction"] < 1:
        criterion = sharing["criterion"].replace("_", " ")
        parts.append(f"{sharing['fraction']:.0%} of the layers are shared, by {criterion}")
    if sharing["head"] == "personal":
        parts.append("the head is personal")
    return "; ".join(parts)


def _round_head(about: Mapping[str, Any]) -> Text:
    """The headings of :func:`_round_line`."""
    indent = " " * len(_round_name(about["planned_rounds"], about))
    columns = f"{'train loss':>12}{'depth':>10}{'measured':>12}{'modelled':>12}"
    return Text(f"{indent}{'accuracy':<{5 + BAR_WIDTH}}{columns}", style="dim")


def _round_name(round: int, about: Mapping[str, Any]) -> str:
    return f"round {round:>{len(str(about['planned_rounds']))}}  "


def _round_line(row: RoundRow, about: Mapping[str, Any]) -> Text:
    line = Text(_round_name(row.round, about))
    line.append(f"{_percent(row.global_accuracy):<5}", style="bold green")
    filled = round((row.global_accuracy or 0.0) * BAR_WIDTH)
    unmeasured = row.global_accuracy is None
    line.append("━" * filled, style="green")
    line.append((" " if unmeasured else "━") * (BAR_WIDTH - filled), style="bright_black")
    loss = "–" if row.train_loss is None else f"{row.train_loss:.3f}"
    depth = "–" if row.mean_active_layers is None else f"{row.mean_active_layers:.2f}"
    line.append(f"{loss:>12}{depth + '/' + str(_not_frozen(about)):>10}")
    line.append(f"{_seconds(row.host_wall_s):>12}{_seconds(row.round_modelled_s):>12}")
    return line


def _not_frozen(about: Mapping[str, Any]) -> int:
    """How many layers are not frozen; drop rates and depth are about these."""
    layers: int = about["num_layers"] - about["config"]["frozen"]["layers"]
    return layers


def _left_out(row: RoundRow) -> Iterator[Text]:
    """Lines about clients whose update was not merged in a round, and why."""
    indent = " " * 9
    for failure in row.failures:
        yield Text(f"{indent}client {failure['client']}: {failure['reason']}", style="red")
    groups = {"absent": row.absent, "late": row.late, "surplus": row.surplus}
    named = [f"{name} {', '.join(map(str, who))}" for name, who in groups.items() if who]
    if named:
        yield Text(f"{indent}on the modelled clock: {'; '.join(named)}", style="dim")


def _arms(row: RoundRow, about: Mapping[str, Any]) -> Iterator[Text]:
    """A line with the arms that the configurator chose in a round, and the best arm so far.

    The best arm may be one that was not tried lately: its expected reward may be the highest.
    """
    notes = row.notes or {}
    if "chosen" not in notes:
        return
    counts = Counter(str(number) for number in notes["chosen"].values())
    chosen = "; ".join(f"{count} x {notes['labels'][arm]}" for arm, count in counts.most_common())
    best = notes["labels"][str(notes["best"])]
    trials = notes["trials"][notes["present"].index(notes["best"])]
    status = "best so far" if trials else "expected to be best, but not tried lately"
    frozen = about["config"]["frozen"]["layers"]
    above = f" above {frozen} frozen layers" if frozen else ""
    yield Text(f"arms{above}: {chosen} ({status}: {best})", style="dim")


def bar(console: Console) -> Progress:
    """A progress bar with rate and remaining time, not started; disabled without a terminal."""
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
        disable=not console.is_terminal,
    )


class Rate(ProgressColumn):
    """Finished items per minute."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("  –/min", style="dim")
        return Text(f"{60 * task.speed:.1f}/min", style="dim")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".removeprefix("0")


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    minutes, seconds = divmod(value, 60)
    return f"{int(minutes)} min {seconds:02.0f} s" if minutes else f"{seconds:.1f} s"


def _joules(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} J" if value < 1000 else f"{value / 1000:.1f} kJ"


def bytes_text(value: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
