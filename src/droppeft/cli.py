"""The command line: ``droppeft`` and its commands."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from droppeft import __version__
from droppeft.command_line_settings import CommandWithSettings, Overrides, setting_keys
from droppeft.command_line_words import (
    comparison_of,
    config_to_measure,
    drop_rates,
    file_and_settings,
    file_methods_settings,
    more_rounds,
    seed_numbers,
)
from droppeft.errors import DroppeftError, Interrupted
from droppeft.node_commands import node
from droppeft.quantities import counted

if TYPE_CHECKING:
    from droppeft.runs.listener import Listener

USER_ERROR, FAILED, STOPPED = 2, 1, 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated fine-tuning of language models.",
)


app.add_typer(node, name="node")

Out = Annotated[
    Path | None, typer.Option(help="New folder for the run.", show_default="runs/TIME-METHOD")
]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Print the final quality only.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print a JSON object per round.")]


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
RoundOption = Annotated[
    int | None,
    typer.Option(help="Round of a saved checkpoint.", show_default="the delivered round"),
]
ClientOption = Annotated[
    int | None, typer.Option(help="Use this client's model.", show_default="the global model")
]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="0: the most probable token; above: tokens are drawn.")
]


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
        from droppeft.server.run import resume_run

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
    from droppeft.report.page import write_page

    lines = report.Lines(console)
    try:
        compared = compare_in_folder(study, every, chosen_seeds, folder, lines)
    except (Interrupted, KeyboardInterrupt):
        _leave("stopped; finished runs are saved, and the same command continues", STOPPED)
    except OSError as error:
        _leave(f"cannot continue: {error}; finished runs are saved", FAILED)
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
    """Write an HTML page about a run or a comparison, and its figures as PNG and SVG."""
    from droppeft.report.page import write_page

    typer.echo(write_page(folder))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    round: Annotated[
        int | None,
        typer.Option(help="Round of a saved checkpoint.", show_default="the delivered round"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder.", show_default="RUN/adapter-round-N or RUN/merged-round-N"),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a plain transformers model, not an adapter.")
    ] = False,
    client: Annotated[
        int | None,
        typer.Option(help="Export this client's model.", show_default="the global model"),
    ] = None,
) -> None:
    """Export a checkpoint as an adapter in PEFT's format, or as a merged model."""
    from droppeft.report.screen import Screen
    from droppeft.runs.folder import saved_config

    saved_config(folder)
    from droppeft.runs.export import export_run  # loads PyTorch

    try:
        with Screen() as screen:
            done = export_run(folder, out, round, merge, screen.preparing, client)
    except KeyboardInterrupt:
        _leave("stopped; nothing was written", STOPPED)
    measured = (
        "not evaluated in this round"
        if done.value is None
        else f"{done.metric} {done.value:.4f} on {counted(done.rows, 'test text')}"
    )
    typer.echo(f"round {done.round}, {measured}: {done.folder}\n\n{done.lines}", nl=False)


@app.command()
def predict(
    folder: RunFolder,
    file: Annotated[
        Path, typer.Argument(help="File with a column of texts; labels are not needed.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="New .csv, .jsonl or .parquet file.", show_default="FILE-predicted.csv"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text column, or two as A,B.", show_default="as in the run, else by a usual name"
        ),
    ] = None,
    round: RoundOption = None,
    client: ClientOption = None,
    all_probabilities: Annotated[
        bool, typer.Option("--all-probabilities", help="Add a column for each class.")
    ] = False,
) -> None:
    """Predict the class of each row of a file with the model of a run.

    The new file has all columns of FILE, and the predicted class with its probability. If FILE has
    the labels too, the accuracy is printed.
    """
    from droppeft.report.predicted_file import predict_file

    columns = [name.strip() for name in (text or "").split(",") if name.strip()]
    try:
        predict_file(folder, file, out, round, client, columns, all_probabilities)
    except KeyboardInterrupt:
        _leave("stopped; nothing was written", STOPPED)


@app.command()
def chat(
    folder: RunFolder,
    round: RoundOption = None,
    client: ClientOption = None,
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
) -> None:
    """Talk to the language model of a run."""
    from droppeft.runs.folder import saved_config

    saved_config(folder)
    from droppeft.report.talking import talk
    from droppeft.tasks.generation import GenerationSettings

    talk(folder, GenerationSettings(max_new_tokens, temperature, batch_size=1), round, client)


@app.command()
def generate(
    folder: RunFolder,
    prompts: Annotated[
        Path,
        typer.Argument(help="File with a column prompt, messages or instruction.", metavar="FILE"),
    ],
    out: Annotated[
        Path | None, typer.Option(help="New file.", show_default="FILE-generated.jsonl")
    ] = None,
    round: RoundOption = None,
    client: ClientOption = None,
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.")] = 8,
) -> None:
    """Let the language model of a run complete the prompts of a file."""
    from droppeft.runs.folder import saved_config

    saved_config(folder)
    from droppeft.report.talking import complete_file
    from droppeft.tasks.generation import GenerationSettings

    settings = GenerationSettings(max_new_tokens, temperature, batch_size=batch_size)
    try:
        written = complete_file(folder, prompts, out, settings, round, client)
    except KeyboardInterrupt:
        _leave("stopped; nothing was written", STOPPED)
    typer.echo(written)


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


@app.command(cls=CommandWithSettings)
def profile(
    overrides: Overrides = None,
    rates: Annotated[str, typer.Option(help="Mean drop rates.")] = "0,0.25,0.5,0.75",
    repeats: Annotated[int, typer.Option(min=1, help="Profile runs per rate.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps per profile run.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the JSON and a figure.", show_default="nowhere")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what a training step takes on this machine, at several drop rates.

    Settings are those of a run, such as model=config:bert-large
    training.batch_size=4. The input is random tokens. Each profile run has its own
    process, and the runs of different rates alternate.
    """
    from rich.console import Console

    from droppeft.extras import require
    from droppeft.report import show_profile as report

    if out is not None:
        require("report", "the figure in --out")
    config = config_to_measure(
        overrides or [], ["dropout.protect_first=0", "dropout.protect_last=0"]
    )
    console = Console(stderr=True) if as_json else Console()
    try:
        result = report.run_profile(config, drop_rates(rates), repeats, steps, console)
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
        typer.Argument(
            metavar="CONFIG.toml KEY=VALUE,VALUE ...",
            show_default=False,
            autocompletion=setting_keys,
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of the device, as 8GB.", show_default="the profile's")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile", help="Device profile that step times are modelled on.", show_default="none"
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Longest step on --profile, in seconds.", show_default="any"),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show all that fits.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate which settings fit a device, from the model's configuration alone.

    Settings are those of a run that change the cost of a training step. The
    following may have several values: model, adapter.type, training.batch_size,
    training.max_length, training.precision, training.checkpointing,
    training.offload, dropout.mean, frozen.layers (also half), quantization.
    Those that save memory are varied when they are not given. Of the combinations
    that fit, those that need the fewest memory-saving options are shown. The exit
    code is 1 if nothing fits.
    """
    from rich.console import Console

    from droppeft.report import show_estimate as report
    from droppeft.report.screen import Screen
    from droppeft.resources.estimate import combinations, limits

    console = Console(stderr=True) if as_json else Console()
    with Screen(console) as screen:
        words = file_and_settings(overrides or [])
        configs = list(combinations(*words, screen.preparing))
    device = limits(memory, seconds, profile, configs[0].clock.custom)
    answer = report.consider(configs, device, profile, console)
    if as_json:
        typer.echo(report.as_json(answer))
    else:
        report.show(answer, console, everything=everything)
    raise typer.Exit(0 if answer.fitting else FAILED)


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="Folder of the federation's keys.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or IP address of the server; may be repeated.", show_default=False),
    ] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Number of clients.", show_default="3")
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make a new certificate for the server.")
    ] = False,
) -> None:
    """Make the certificates and keys of a federation of sites, one folder for each party.

    With --clients, the folder of a federation gets the keys of further clients. Nothing is
    overwritten but the server's certificate with --renew.
    """
    from droppeft.extras import require
    from droppeft.report import show_keys as report

    require("flower", "a federation of sites")
    from droppeft.transports.flower.keys import add_clients, make_federation, renew_server

    if renew and clients:
        raise DroppeftError("--renew and --clients are two steps; give one after the other")
    if renew:
        typer.echo(report.about_renewed(folder, renew_server(folder, host or ())))
    elif host:
        made = make_federation(folder, host, clients or 3)
        typer.echo(report.about_federation(folder, host[0], made))
    elif clients and folder.is_dir():
        typer.echo(report.about_new_clients(folder, add_clients(folder, clients)))
    else:
        raise DroppeftError("--host is missing: the name or IP address of the server")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def superlink(context: typer.Context) -> None:
    """Run Flower's SuperLink, of which other machines reach only what nodes need.

    It takes the options of flower-superlink. Other machines cannot start runs and cannot register
    nodes: Control API and Runtime API serve this machine only.
    """
    from droppeft.extras import require

    require("flower", "a SuperLink")
    from droppeft.transports.flower.superlink import run

    run(context.args)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def supernode(context: typer.Context) -> None:
    """Run Flower's SuperNode, which runs droppeft's ClientApp and no other.

    It takes the options of flower-supernode. An app with code of its own is not run, whoever sends
    it, so that the rules of the site's node file hold.
    """
    from droppeft.extras import require

    require("flower", "a SuperNode")
    from droppeft.transports.flower.supernode import run

    run(context.args)


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


def main() -> None:
    """Entry point: a user's mistake is reported in one sentence with exit code 2; Ctrl-C is 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except DroppeftError as error:
        _leave(str(error), USER_ERROR)


def _with_listener(
    work: "Callable[[Listener], None]", folder: Path, quiet: bool, as_json: bool
) -> None:
    """Do the work of a run in ``folder``, with the listener that the flags choose."""
    from droppeft.report.screen import JsonLines, Quiet, Screen

    try:
        if as_json or quiet:
            work(JsonLines() if as_json else Quiet())
        else:
            with Screen(folder=folder) as screen:
                screen.preparing("loading PyTorch and transformers")
                work(screen)
    except KeyboardInterrupt:
        _leave(f"stopped while preparing; {_how_to_go_on(folder)}", STOPPED)
    except OSError as error:
        _leave(f"cannot continue: {error}; {_how_to_go_on(folder)}", FAILED)
    except Interrupted as stop:
        when = f"after round {stop.round}, which is saved" if stop.round else "in round 1"
        _leave(f"stopped {when}; {_how_to_go_on(stop.folder)}", STOPPED)


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


def _leave(message: str, code: int) -> None:
    sys.stderr.write(f"droppeft: {message}\n")
    sys.exit(code)
