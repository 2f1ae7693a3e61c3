"""The command line: ``droppeft`` and its commands."""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from droppeft import __version__
from droppeft.command_line_exit import FAILED, STOPPED, USER_ERROR, leave
from droppeft.command_line_settings import CommandWithSettings, Overrides, setting_keys
from droppeft.command_line_words import (
    comparison_of,
    file_and_settings,
    file_methods_settings,
    more_rounds,
    seed_numbers,
)
from droppeft.cost_commands import calibrate, estimate, profile
from droppeft.errors import DroppeftError, Interrupted
from droppeft.federation_commands import keys, superlink, supernode
from droppeft.model_commands import chat, export, generate, predict
from droppeft.node_commands import node
from droppeft.ui_commands import serve, ui

if TYPE_CHECKING:
    from droppeft.runs.listener import Listener

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated fine-tuning of language models.",
)

Out = Annotated[
    Path | None, typer.Option(help="New folder for the run.", show_default="runs/TIME-METHOD")
]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Print the final quality only.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print a JSON object per round.")]


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

    Settings are given as KEY=VALUE, such as data=./reviews or rounds=30, or in a
    .toml file; KEY=VALUE wins over the file. Without settings, method=adaptive is run
    on the built-in model and data. `droppeft settings` lists all settings.
    """
    from droppeft.config import load_config
    from droppeft.data.splits import check_found
    from droppeft.methods.rules import check_settings
    from droppeft.runs.folder import check_free, new_folder

    # All that can be refused before PyTorch is loaded, which takes seconds.
    config = load_config(*file_and_settings(overrides or []))
    check_settings(config)
    check_found(os.path.expandvars(config.data))
    folder = out or new_folder(config.method)
    check_free(folder)

    def work(listener: "Listener") -> None:
        from droppeft.server.run import start_run

        start_run(config, folder, listener)

    _with_listener(work, folder, quiet, as_json)


@app.command(cls=CommandWithSettings)
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[rounds=NUMBER]", show_default=False)
    ] = None,
    quiet: QuietFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Continue a run that was stopped, or give a finished one more rounds.

    The result of a run that was stopped is the same as without the stop. With
    rounds=40 a run is continued until it has 40 rounds. Where the learning rate falls
    over the run, it rises again to where it would be in a run of 40 rounds.
    """
    from droppeft.runs.folder import check_holds_run

    rounds = more_rounds(settings or [])
    check_holds_run(folder.resolve())

    def work(listener: "Listener") -> None:
        from droppeft.runs.folder import RESULT
        from droppeft.server.resume import resume_run

        if (folder / RESULT).is_file() and rounds is None and not (quiet or as_json):
            typer.echo(f"droppeft: {folder} is finished already; its result:", err=True)
        resume_run(folder, listener, rounds=rounds)

    _with_listener(work, folder, quiet, as_json)


@app.command(cls=CommandWithSettings)
def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMPARISON.toml | METHOD ... KEY=VALUE ...",
            show_default=False,
            autocompletion=setting_keys,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder, or one to continue.", show_default="runs/compare-NAME"),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Run only these, as 0,1.", show_default="the file's, or 0,1,2"),
    ] = None,
) -> None:
    """Run several methods or variants and compare their results.

    Either name a .toml file with variants, data, models, seeds and a target, or
    name methods, and settings for all methods that use them. Finished runs are not
    repeated: the same command continues a comparison that was stopped.
    With --seeds, only these seeds of the file are run; other processes can run the
    others in the same folder. Tables and page contain all runs that are finished.
    """
    from rich.console import Console

    from droppeft.comparison.grid import cells
    from droppeft.extras import require

    require("report", "the page of a comparison")
    file, methods, settings = file_methods_settings(overrides or [])
    chosen_seeds = None if seeds is None else seed_numbers(seeds)
    comparison = comparison_of(file, methods, settings, chosen_seeds)
    study = comparison.study(
        file.read_text(encoding="utf-8") if file else "",
        shlex.join(["droppeft", *sys.argv[1:]]),
    )
    folder = out or Path("runs") / f"compare-{_name_of(file) if file else '-'.join(methods)}"
    every, console = cells(comparison), Console()

    from droppeft.comparison.in_folder import compare_in_folder  # loads PyTorch
    from droppeft.report import show_comparison as report
    from droppeft.report.comparison_page import write_page

    lines = report.Lines(console)
    try:
        compared = compare_in_folder(study, every, chosen_seeds, folder, lines)
    except (Interrupted, KeyboardInterrupt):
        leave("stopped; finished runs are saved, and the same command continues", STOPPED)
    except OSError as error:
        leave(f"cannot continue: {error}; finished runs are saved", FAILED)
    finally:
        lines.close()
    report.show(compared.parts, console)
    typer.echo(f"page: {write_page(folder)}; tables, data and a folder per run beside it")
    if compared.failed:
        raise typer.Exit(FAILED)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run or a comparison.")],
) -> None:
    """Write the HTML page of a run again, or the page and the figures of a comparison."""
    from droppeft.comparison.study_files import STUDY

    if (folder / STUDY).is_file():
        from droppeft.report.comparison_page import write_page

        typer.echo(write_page(folder))
    else:
        from droppeft.report.run_page import write_run_page

        typer.echo(write_run_page(folder))


for with_model in (export, predict, chat, generate, serve):
    app.command()(with_model)

app.command()(ui)


@app.command(cls=CommandWithSettings)
def data(
    name: Annotated[str, typer.Argument(metavar="DATA", help="Folder, file, Hub id or builtin.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE ...", show_default=False, autocompletion=setting_keys),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Training rows to show.")] = 3,
) -> None:
    """Check a data set: columns, classes, lengths, clients, and what is unusual.

    It also shows rows as a model sees them; of conversations, what is learnt is
    shown in another colour than the rest. Settings are task, model (its tokenizer
    is used), training.max_length, training.loss_on, clients, seed, and those that
    begin with source. or partition., such as source.label=category.
    """
    from rich.console import Console

    from droppeft.config import load_config
    from droppeft.data.splits import check_found
    from droppeft.data.summary import check_settings, summarise
    from droppeft.report import show_data as report
    from droppeft.report.screen import Screen

    overrides = settings or []
    check_settings(overrides)
    config = load_config(None, [f"data={name}", *overrides])
    check_found(config.data)

    def load_tokenizer() -> Any:
        from droppeft.models.sources import find_source  # loads PyTorch

        source = find_source(config.model)
        with Screen() as screen:
            source.convert(screen.preparing)
        return source.load_tokenizer()

    report.show(name, config.model, summarise(config, load_tokenizer, show), Console())


@app.command()
def settings(
    word: Annotated[
        str | None,
        typer.Argument(
            metavar="WORD", help="In the name or description of a setting.", show_default=False
        ),
    ] = None,
) -> None:
    """List the settings of a run with their defaults, or those that have to do with WORD."""
    from rich.console import Console

    from droppeft.report import show_settings as report

    report.show(report.matching(word or ""), Console(highlight=False))


for of_cost in (profile, calibrate, estimate):
    app.command(cls=CommandWithSettings)(of_cost)

app.command()(keys)

for of_flower in (superlink, supernode):
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )(of_flower)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this installation, and say what to do about what is missing.

    The exit code is 1 if a run with the built-in model and data would not work.
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


app.add_typer(node, name="node")


def main() -> None:
    """Entry point: a user's mistake is reported in one sentence with exit code 2; Ctrl-C is 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Threads that wait for each other sleep. By default they spin, which beside other busy
    # processes takes many times as long. OpenMP reads this when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except DroppeftError as error:
        leave(str(error), USER_ERROR)


def _with_listener(
    work: "Callable[[Listener], None]", folder: Path, quiet: bool, as_json: bool
) -> None:
    """Do the work of a run in ``folder``, with the listener that the flags choose."""
    from droppeft.report.page_writer import PageWriter
    from droppeft.report.screen import JsonLines, Quiet, Screen
    from droppeft.runs.callbacks import Callbacks

    page = PageWriter(folder)
    try:
        if as_json or quiet:
            work(Callbacks([page, JsonLines() if as_json else Quiet()]))
        else:
            with Screen(folder=folder) as screen:
                screen.preparing("loading PyTorch and transformers")
                work(Callbacks([page, screen]))
    except KeyboardInterrupt:
        leave(f"stopped while preparing; {_how_to_go_on(folder)}", STOPPED)
    except OSError as error:
        leave(f"cannot continue: {error}; {_how_to_go_on(folder)}", FAILED)
    except Interrupted as stop:
        when = f"after round {stop.round}, which is saved" if stop.round else "in round 1"
        leave(f"stopped {when}; {_how_to_go_on(stop.folder)}", STOPPED)


def _how_to_go_on(run: Path) -> str:
    """How to continue a run that ended early, if there is a run in its folder."""
    from droppeft.runs.folder import CONFIG

    if not (run / CONFIG).is_file():
        return "nothing was written"
    return f"go on with: droppeft resume {shlex.quote(str(run))}"


def _name_of(comparison: Path) -> str:
    """The name of a comparison's file; of a study, whose file is ``study.toml``, its folder's."""
    from droppeft.comparison.study_files import DEFINITION

    is_study = comparison.name == DEFINITION
    return comparison.resolve().parent.name if is_study else comparison.stem
