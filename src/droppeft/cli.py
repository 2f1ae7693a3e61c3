"""The command line: ``droppeft`` and its commands."""

import json
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import Context, NoSuchOption, UsageError
from typer.core import TyperCommand

from droppeft import __version__
from droppeft.errors import DroppeftError

if TYPE_CHECKING:
    from droppeft.config import Config
    from droppeft.runs.listener import Listener

USER_ERROR, FAILED, STOPPED = 2, 1, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of language models with stochastic layer dropout.",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONFIG.toml KEY=VALUE ...", show_default=False),
]
Out = Annotated[
    Path | None, typer.Option(help="New folder for the run.", show_default="runs/TIME-METHOD")
]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Print the final accuracy only.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print a JSON object per round.")]


class CommandWithSettings(TyperCommand):
    """A command with settings as overrides, which says so of a setting written as an option."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """As click's; an unknown option that a setting is called says how to write it."""
        from droppeft.config import known_keys

        try:
            return super().parse_args(ctx, args)
        except NoSuchOption as error:
            key = error.option_name.lstrip("-").replace("-", "_")
            if key not in dict(known_keys()):
                raise
            said = f"{key} is a setting: write {key}=VALUE, without dashes."
            raise UsageError(said, ctx) from None


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"droppeft {__version__}")
        raise typer.Exit


@app.command(cls=CommandWithSettings)
def run(
    overrides: Overrides = None,
    out: Out = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Fine-tune a model across simulated clients.

    Settings are overrides such as data=./reviews or dropout.count=3; a .toml file
    may hold them too, and overrides win over it. Without any, the built-in model
    and data are used. docs/configuration.md lists all settings.
    """
    from droppeft.config import load_config
    from droppeft.server.run import start_run

    config = load_config(*_split(overrides or []))
    folder = out or _new_folder(config.method)
    _with_listener(lambda listener: start_run(config, folder, listener), quiet, as_json)
    if not (quiet or as_json):
        _say_where(folder)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of a run that was stopped.")],
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Go on with a run that was stopped; it ends as if it had not been."""
    from droppeft.runs.folder import RESULT
    from droppeft.server.run import resume_run

    if (folder / RESULT).is_file() and not (quiet or as_json):
        typer.echo(f"droppeft: {folder} is finished; this is what it came to", err=True)
    _with_listener(lambda listener: resume_run(folder, listener), quiet, as_json)
    if not (quiet or as_json):
        _say_where(folder)


@app.command(cls=CommandWithSettings)
def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMPARISON.toml | METHOD ... KEY=VALUE ...", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; go on in it.", show_default="runs/compare-NAME")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="These alone, as 0,1.", show_default="the file's, or 0,1,2"),
    ] = None,
) -> None:
    """Run methods side by side, and say what each is worth.

    A .toml file names variants, data, models, seeds and a target; or methods
    are named here, with settings for all that heed them. What is done is not run
    again: the same command goes on where it was stopped. With --seeds a file's
    other seeds are left to other calls, on other cores say; whoever ends last
    has them all.
    """
    from rich.console import Console

    from droppeft.comparison import grid, runner, summary, writers
    from droppeft.report import show_comparison as report
    from droppeft.report.page import write_page
    from droppeft.server.run import Interrupted

    files = [word for word in overrides or [] if word.endswith(".toml") and "=" not in word]
    methods = [word for word in overrides or [] if "=" not in word and word not in files]
    settings = [word for word in overrides or [] if "=" in word]
    if len(files) > 1 or (files and (methods or settings)) or not (files or methods):
        raise DroppeftError(
            "name one .toml file, or methods and settings: droppeft compare fedlora fedra rounds=5"
        )
    of = None if seeds is None else _whole_numbers(seeds)
    chosen = (
        grid.read_comparison(Path(files[0]))
        if files
        else grid.named_on_the_command_line(methods, settings, of)
    )
    if of and not {*of} <= {*chosen.seeds}:
        there = ",".join(map(str, chosen.seeds))
        raise DroppeftError(f"--seeds {seeds}: {files[0]} has {there}")
    every = grid.cells(chosen)
    mine = [cell for cell in every if of is None or cell.seed in of]
    name = _name_of(Path(files[0])) if files else "-".join(methods)
    folder, console = out or Path("runs") / f"compare-{name}", Console()
    study = chosen.study(
        Path(files[0]).read_text(encoding="utf-8") if files else "",
        shlex.join(["droppeft", *sys.argv[1:]]),
    )
    lines = report.Lines(console)
    try:
        own = runner.run_cells(mine, folder, lines)
        records = runner.with_others(own, every, folder)
        parts = summary.summary(study, records)
        writers.write(folder, study, records, parts)
    except (Interrupted, KeyboardInterrupt):
        _leave("stopped; what is done is kept, and the same command goes on", STOPPED)
    except OSError as error:
        _leave(f"cannot go on: {error}; runs that are complete stay saved", FAILED)
    finally:
        lines.close()
    report.show(parts, console)
    typer.echo(f"page: {write_page(folder)}; tables, data and a folder per run beside it")
    if any(one.result is None for one in own):
        raise typer.Exit(FAILED)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run or a comparison.")],
) -> None:
    """Write one page about a run or a comparison, and its figures as PNG and SVG."""
    from droppeft.report.page import write_page

    typer.echo(write_page(folder))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    round: Annotated[
        int | None, typer.Option(help="Which kept checkpoint.", show_default="the newest")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder.", show_default="RUN/adapter-round-N or RUN/merged-round-N"),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="A plain transformers model instead of an adapter.")
    ] = False,
    client: Annotated[
        int | None,
        typer.Option(help="Whose own model, with what it keeps.", show_default="the global one"),
    ] = None,
) -> None:
    """Write a checkpoint's adapter in PEFT's format, or merged into the model."""
    from droppeft.report.screen import Screen
    from droppeft.runs.export import export_run

    try:
        with Screen() as screen:
            done = export_run(folder, out, round, merge, screen.preparing, client)
    except KeyboardInterrupt:
        _leave("stopped; nothing was written", STOPPED)
    measured = (
        "not evaluated then"
        if done.accuracy is None
        else f"accuracy {done.accuracy:.4f} on {done.rows} test texts"
    )
    typer.echo(f"round {done.round}, {measured}: {done.folder}\n\n{done.lines}", nl=False)


@app.command(cls=CommandWithSettings)
def profile(
    overrides: Overrides = None,
    rates: Annotated[str, typer.Option(help="Mean drop rates.")] = "0,0.25,0.5,0.75",
    repeats: Annotated[int, typer.Option(min=1, help="Trials per rate.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps per trial.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the JSON and a figure.", show_default="nowhere")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what a training step takes on this machine, at several drop rates.

    Settings are a run's, as model=config:bert-large training.batch_size=4;
    texts are random. Each trial has a process of its own, and rates take
    turns.
    """
    from rich.console import Console

    from droppeft.report import show_profile as report

    config = _to_measure(overrides or [], ["dropout.protect_first=0", "dropout.protect_last=0"])
    console = Console(stderr=True) if as_json else Console()
    try:
        result = report.run_profile(config, _numbers(rates), repeats, steps, console)
    except KeyboardInterrupt:
        _leave("stopped; nothing was written", STOPPED)
    if out is not None:
        report.write(result, out)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        report.show(result, console)


@app.command(cls=CommandWithSettings)
def estimate(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG.toml KEY=VALUE,VALUE ...", show_default=False),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What a client has, as 8GB.", show_default="the client's")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="A device profile, for time.", show_default="none"),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Longest step on --profile.", show_default="any")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show all that fits.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say which settings fit a device, from the model's configuration alone.

    Settings are a run's that change what a step costs; these may have several
    values, and are tried with some where nothing is said: model, adapter.type, training.batch_size,
    training.max_length, training.precision, training.checkpointing,
    training.offload, dropout.mean, frozen.layers (also half), quantization.
    Of what fits, that is shown which saves no more than it must. The exit
    code is 1 where nothing fits.
    """
    from rich.console import Console

    from droppeft.report import show_estimate as report
    from droppeft.resources.estimate import combinations, limits

    configs = list(combinations(*_split(overrides or [])))
    found = limits(memory, seconds, profile, configs[0].clock.custom)
    console = Console(stderr=True) if as_json else Console()
    answer = report.consider(configs, found, profile, console)
    if as_json:
        typer.echo(report.as_json(answer))
    else:
        report.show(answer, console, everything=everything)
    raise typer.Exit(0 if answer.fitting else FAILED)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this installation has, what it lacks, and what to do about it.

    The exit code is 1 when a run with the built-in model and data would not work.
    """
    from rich.console import Console

    from droppeft.doctor import examine
    from droppeft.report import show_doctor as report

    findings = examine()
    if as_json:
        typer.echo(report.as_json(findings))
    else:
        report.show(findings, Console())
    raise typer.Exit(0 if report.is_ready(findings) else FAILED)


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2, Ctrl-C is 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except DroppeftError as error:
        _leave(str(error), USER_ERROR)


def _with_listener(work: "Callable[[Listener], Any]", quiet: bool, as_json: bool) -> None:
    from droppeft.report.screen import JsonLines, Quiet, Screen
    from droppeft.server.run import Interrupted

    try:
        if as_json or quiet:
            work(JsonLines() if as_json else Quiet())
        else:
            with Screen() as screen:
                work(screen)
    except KeyboardInterrupt:
        _leave("stopped while preparing; nothing is lost", STOPPED)
    except OSError as error:
        _leave(f"cannot go on: {error}; rounds that are complete stay saved", FAILED)
    except Interrupted as stop:
        _leave(
            f"stopped after round {stop.round}, which is saved; "
            f"go on with: droppeft resume {stop.folder}",
            STOPPED,
        )


def _say_where(folder: Path) -> None:
    typer.echo(f"result, ledger and checkpoints: {folder}")


def _name_of(comparison: Path) -> str:
    """A study is called as its folder is, another file by its own name."""
    from droppeft.comparison.study_files import DEFINITION

    own = comparison.name != DEFINITION
    return comparison.stem if own else comparison.resolve().parent.name


def _split(overrides: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Tell the configuration file from the settings."""
    files = [word for word in overrides if "=" not in word]
    if len(files) > 1:
        odd = next((word for word in files if not word.endswith(".toml")), files[0])
        meant = _meant(odd, *files[files.index(odd) + 1 :][:1])
        raise DroppeftError(
            f"only one configuration file can be given, got {' and '.join(files)}{meant}"
        )
    if files and not files[0].endswith(".toml"):
        raise DroppeftError(f"{files[0]!r} is neither a .toml file nor key=value{_meant(*files)}")
    return (Path(files[0]) if files else None), [word for word in overrides if "=" in word]


def _meant(word: str, value: str = "VALUE") -> str:
    """What a word without ``=`` may have been meant for: a setting, or a method."""
    from droppeft.config import known_keys
    from droppeft.methods import METHODS

    if word in METHODS:
        return f"; did you mean method={word}?"
    return f"; did you mean {word}={value}?" if word in dict(known_keys()) else ""


def _to_measure(overrides: Sequence[str], defaults: Sequence[str]) -> "Config":
    """The configuration of a step; overrides win over the defaults."""
    import torch

    from droppeft.config import load_config, resolve
    from droppeft.methods.rules import check_costly

    path, settings = _split(overrides)
    check_costly(settings)
    config = load_config(path, [*defaults, *settings])
    return resolve(config, cuda=torch.cuda.is_available())


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DroppeftError(f"--rates {text!r}: write numbers as 0,0.25,0.5") from None


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DroppeftError(f"--seeds {text!r}: write whole numbers as 0,1,2") from None


def _new_folder(method: str) -> Path:
    """A name for the folder; to the millisecond, for runs that a script starts together."""
    time = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    return Path("runs") / f"{time}-{method}"


def _leave(message: str, code: int) -> None:
    sys.stderr.write(f"droppeft: {message}\n")
    sys.exit(code)
