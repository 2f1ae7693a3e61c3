"""The commands that open pages in the browser: `droppeft ui` and `droppeft serve`. Ours."""

from pathlib import Path
from typing import Annotated

import typer

from droppeft.command_line_exit import STOPPED, leave
from droppeft.model_commands import (
    ClientOption,
    NewTokensOption,
    RoundOption,
    RunFolder,
    TemperatureOption,
)

HostOption = Annotated[
    str, typer.Option(help="Address to listen at; others than this let other machines in.")
]
PortOption = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="Port of the page.", show_default="7860, or a free one"),
]


def ui(
    folder: Annotated[
        Path, typer.Argument(metavar="[RUNS]", help="Folder of a run, of runs or of a comparison.")
    ] = Path("runs"),
    host: HostOption = "127.0.0.1",
    port: PortOption = None,
) -> None:
    """Watch runs in the browser, side by side, also while they go on.

    The page shows quality and loss by round, progress, time, traffic, and what the clients did in
    the last round. It refreshes itself and lists runs that begin later. Nothing is loaded from
    other hosts or sent to them.
    """
    from droppeft.extras import require

    require("ui", "the page of runs")
    from droppeft.ui.dashboard import watch_runs

    watch_runs(folder, host, port)


def serve(
    folder: RunFolder,
    round: RoundOption = None,
    client: ClientOption = None,
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    host: HostOption = "127.0.0.1",
    port: PortOption = None,
) -> None:
    """Try the model of a run in the browser: classify texts, or chat.

    Nothing is loaded from other hosts or sent to them.
    """
    from droppeft.extras import require
    from droppeft.runs.folder import saved_config

    require("ui", "the page of a model")
    saved_config(folder)
    from droppeft.tasks.generation import GenerationSettings  # loads PyTorch
    from droppeft.ui.model_page import serve_model

    settings = GenerationSettings(max_new_tokens, temperature, batch_size=1)
    try:
        serve_model(folder, settings, host, port, round, client)
    except KeyboardInterrupt:
        leave("stopped while loading the model", STOPPED)
