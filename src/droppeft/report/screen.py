"""A run on the terminal: header, progress with rate and time left, a line per round, a table."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group
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
    """Shows a run to a person; use it as a context manager around the run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress = bar(self.console)
        self._status = self.console.status("")
        self._rounds: TaskID | None = None
        self._variants: TaskID | None = None
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
            self.console.print(Text(f"going on after round {rows[-1].round}", style="yellow"))
        self._rounds = self._progress.add_task(
            "rounds ", total=about["planned_rounds"], completed=len(rows)
        )
        self._variants = self._progress.add_task("clients", total=about["drawn_size"])
        self.console.print(_round_head(about))
        self._progress.start()

    def replied(self, reply: Reply) -> None:
        """Move the bar of the present round."""
        if self._variants is not None:
            self._progress.advance(self._variants)

    def round_done(self, row: RoundRow) -> None:
        """Print the round's line."""
        if self._rounds is None or self._variants is None:
            return
        self.console.print(_round_line(row, self._about))
        for line in _left_out(row):
            self.console.print(line)
        for line in _thought(row, self._about):
            self.console.print(Padding(line, (0, 0, 0, 9)))
        self._progress.advance(self._rounds)
        self._progress.reset(self._variants)

    def finished(self, result: Mapping[str, Any]) -> None:
        """Print the closing table."""
        self._status.stop()
        self._progress.stop()
        self.console.print(closing_table(result))


class Quiet:
    """Says one line, at the end."""

    def preparing(self, what: str) -> None:
        """Nothing."""

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """Nothing."""

    def replied(self, reply: Reply) -> None:
        """Nothing."""

    def round_done(self, row: RoundRow) -> None:
        """Nothing."""

    def finished(self, result: Mapping[str, Any]) -> None:
        """The accuracy on the whole test set."""
        print(accuracy_line(result))


class JsonLines(Quiet):
    """Prints a JSON object per round and one for the result, for programs."""

    def round_done(self, row: RoundRow) -> None:
        """The row as in ``rounds.jsonl``."""
        self._print({"event": "round", **asdict(row)})

    def finished(self, result: Mapping[str, Any]) -> None:
        """The content of ``result.json``."""
        self._print({"event": "result", **result})

    def _print(self, content: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()


def closing_table(result: Mapping[str, Any]) -> Table:
    """The result for people: quality beside its references, then what it cost."""
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
        ("before training", _share(result["initial_accuracy"]), sample),
        ("majority class", _share(result["majority_accuracy"]), "reference"),
        (
            "TF-IDF + linear SVM",
            _share(result["tfidf_accuracy"]),
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
        ("accuracy", _share(result["global_accuracy"]), f"all {result['test_rows']:,} test texts"),
        ("F1", _share(result["global_f1"]), _f1_note(result)),
        ("after round 1", _share(result["first_accuracy"]), sample),
        ("best", _share(result["best_accuracy"]), f"round {result['best_round']}, {sample}"),
    ]


def _f1_note(result: Mapping[str, Any]) -> str:
    """Which of F1's several meanings it has here."""
    return "of class 1" if result["classes"] == 2 else "mean over classes (macro)"


def _personalised_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Nothing in a run that did not measure it, as those of earlier versions."""
    if result.get("personalised_accuracy") is None:
        return []
    clients, rows = result["personalised_devices"], result["personalised_rows"]
    note = f"mean of {clients:,} clients' own models on their own {rows:,} test texts"
    worst = max(1, -(-clients // 10))
    of_them = f"of them: {worst} client{'s' * (worst > 1)}"
    failed = result["personalised_failures"]
    if failed:
        note += f"; {len(failed)} could not be measured ({failed[0]['reason']})"
    if lost := result.get("personalised_lost"):
        note += f"; {len(lost)} had lost what they kept and had the global model"
    return [
        ("personalised", _share(result["personalised_accuracy"]), note),
        ("worst tenth", _share(result["personalised_worst_tenth"]), of_them),
        ("deviation", _share(result["personalised_deviation"]), "between them"),
        (
            "own majority class",
            _share(result.get("own_majority_accuracy")),
            "reference: a client that always answers its most frequent class",
        ),
        *_newcomer_lines(result),
    ]


def _newcomer_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of clients that never trained, where they were given an epoch."""
    if result.get("newcomers_accuracy_after_epoch") is None:
        return []
    return [
        ("newcomers", _share(result["newcomers_accuracy"]), "of them: those that never trained"),
        ("", _share(result["newcomers_accuracy_after_epoch"]), "after an epoch of their own rows"),
    ]


def accuracy_line(result: Mapping[str, Any]) -> str:
    """Both accuracies, those that there are."""
    found = {
        "accuracy": result["global_accuracy"],
        "personalised": result.get("personalised_accuracy"),
    }
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items() if value is not None)


def _target_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    name = f"target {_share(result['target'])}"
    if result["target_round"] is None:
        return [(name, "not reached", "")]
    here, modelled = (result[f"time_to_target_{clock}_s"] for clock in ("measured", "modelled"))
    note = f"round {result['target_round']}; clients side by side (measured)"
    return [(name, _seconds(here), note), ("", _seconds(modelled), "on their profiles (modelled)")]


def _cost_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rounds, layers = result["rounds"], _not_frozen(result)
    depth = result["mean_active_layers"]
    behind = "" if layers == result["num_layers"] else " behind the frozen ones"
    return [
        ("time", _seconds(result["host_wall_s"]), f"{rounds} rounds on this machine (measured)"),
        ("of it training", _seconds(result["train_wall_s"]), "all clients one after another"),
        (
            "modelled time",
            _seconds(result["round_modelled_s"]),
            "clients side by side on their profiles",
        ),
        ("energy", _joules(result["energy_modelled_j"]), "all clients (modelled)"),
        ("upload", bytes_text(result["upload_bytes"]), "all clients, all rounds"),
        ("download", bytes_text(result["download_bytes"]), "all clients, all rounds"),
        (
            "mean depth",
            "–" if depth is None else f"{depth:.2f}",
            f"of {layers} layers{behind} per step",
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
    if said := _shared(about["config"]["sharing"]):
        grid.add_row("sharing", said)
    modelled = about["without_clock"] or f"{', '.join(about['profiles'])} (modelled)"
    grid.add_row("profiles", modelled)
    grid.add_row(
        "references",
        f"majority class {_share(about['majority_accuracy'])}, "
        f"TF-IDF + linear SVM {_share(about['tfidf_accuracy'])}",
    )
    content: Group | Table = grid
    if about["builtin_data_as_published"] is False:
        warning = "other library versions than the published ones: accuracies do not compare"
        content = Group(grid, Text(warning, style="yellow"))
    title = f"[bold]droppeft[/] · {about['method']} · seed {about['seed']}"
    return Panel(content, title=title, title_align="left", box=box.ROUNDED, expand=False)


def _shared(sharing: Mapping[str, Any]) -> str:
    """What does not travel, if anything."""
    parts = []
    if sharing["fraction"] < 1:
        criterion = sharing["criterion"].replace("_", " ")
        parts.append(f"{sharing['fraction']:.0%} of the layers travel, by {criterion}")
    if sharing["head"] == "personal":
        parts.append("the head stays")
    return "; ".join(parts)


def _round_head(about: Mapping[str, Any]) -> Text:
    """What the columns of :func:`_round_line` are."""
    indent = " " * len(_round_name(about["planned_rounds"], about))
    columns = f"{'train loss':>12}{'depth':>10}{'here':>12}{'modelled':>12}"
    return Text(f"{indent}{'accuracy':<{5 + BAR_WIDTH}}{columns}", style="dim")


def _round_name(round: int, about: Mapping[str, Any]) -> str:
    return f"round {round:>{len(str(about['planned_rounds']))}}  "


def _round_line(row: RoundRow, about: Mapping[str, Any]) -> Text:
    line = Text(_round_name(row.round, about))
    line.append(f"{_share(row.global_accuracy):<5}", style="bold green")
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
    """Layers that dropout and depth are about; those of ``frozen.layers`` lie below them."""
    layers: int = about["num_layers"] - about["config"]["frozen"]["layers"]
    return layers


def _left_out(row: RoundRow) -> Iterator[Text]:
    """Who was not merged in a round, and why."""
    indent = " " * 9
    for failure in row.failures:
        yield Text(f"{indent}client {failure['client']}: {failure['reason']}", style="red")
    groups = {"absent": row.absent, "late": row.late, "surplus": row.surplus}
    named = [f"{name} {', '.join(map(str, who))}" for name, who in groups.items() if who]
    if named:
        yield Text(f"{indent}on the modelled clock: {'; '.join(named)}", style="dim")


def _thought(row: RoundRow, about: Mapping[str, Any]) -> Iterator[Text]:
    """Which arms the configurator tried in a round, and which it holds for the best.

    An arm that nobody has tried is expected to be worth what the others are, or more.
    """
    notes = row.notes or {}
    if "chosen" not in notes:
        return
    counts = Counter(str(number) for number in notes["chosen"].values())
    tried = "; ".join(f"{count} x {notes['labels'][arm]}" for arm, count in counts.most_common())
    best = notes["labels"][str(notes["best"])]
    trials = notes["trials"][notes["present"].index(notes["best"])]
    said = "best so far" if trials else "not tried lately, and expected to be best"
    frozen = about["config"]["frozen"]["layers"]
    behind = f" behind {frozen} frozen layers" if frozen else ""
    yield Text(f"arms{behind}: {tried} ({said}: {best})", style="dim")


def bar(console: Console) -> Progress:
    """Progress with its rate and the time left, where there is a terminal; not started yet."""
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


def _share(value: float | None) -> str:
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
    """Decimal units, for people."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
