"""The commands that measure a training step or layers, and estimate what fits a device. Ours."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from droppeft.command_line_exit import FAILED, STOPPED, leave
from droppeft.command_line_settings import Overrides, setting_keys
from droppeft.command_line_words import (
    calibration_words,
    config_to_measure,
    drop_rates,
    file_and_settings,
)


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
    with _nothing_written_if_stopped():
        result = report.run_profile(config, drop_rates(rates), repeats, steps, console)
    _deliver(report, result, out, console, as_json=as_json)


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
    from droppeft.resources.device_limits import limits
    from droppeft.resources.estimate import combinations

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


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As the setting model.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="As the setting data.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE ...", show_default=False, autocompletion=setting_keys),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=4, help="Training rows to measure on.", show_default="256; 16 of conversations"
        ),
    ] = None,
    mean: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Mean of the drop rates that are printed.", show_default="1/3"
        ),
    ] = 1 / 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the JSON and a figure.", show_default="nowhere")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what each layer of a model is worth on your data.

    For each layer it measures the loss that is added when the layer alone is skipped,
    and the gradient of its adapter. It prints drop rates that follow: layers that cost
    little are dropped most, and expensive ones never. Settings are those of a run that
    change what is measured: task, model, data, quantization, seed, accelerator,
    training.precision, training.batch_size, training.micro_batch_size,
    training.max_length, training.checkpointing, training.loss_on, and those that begin
    with source. or adapter.
    """
    from rich.console import Console

    from droppeft.config import load_config
    from droppeft.data.splits import check_found
    from droppeft.extras import require
    from droppeft.methods.rules import check_settings
    from droppeft.methods.step_settings import STEP_METHOD

    if out is not None:
        require("report", "the figure in --out")
    words = calibration_words(model, data, settings or [])
    config = load_config(None, words, STEP_METHOD)
    check_settings(config)
    check_found(config.data)

    from droppeft.report import show_calibration as report  # loads PyTorch

    console = Console(stderr=True) if as_json else Console()
    with _nothing_written_if_stopped():
        result = report.run_calibration(config, words, rows, mean, console)
    _deliver(report, result, out, console, as_json=as_json)


@contextmanager
def _nothing_written_if_stopped() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        leave("stopped; nothing was written", STOPPED)


def _deliver(
    report: Any, result: dict[str, Any], out: Path | None, console: Any, *, as_json: bool
) -> None:
    """Write what was measured to ``--out``, and print it as JSON or for readers.

    Args:
        report: the module that writes and shows it.
    """
    if out is not None:
        report.write(result, out)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        report.show(result, console)
