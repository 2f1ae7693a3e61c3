"""The commands that use the model of a run: export it, predict, chat and generate. Ours."""

from pathlib import Path
from typing import Annotated

import typer

from droppeft.command_line_exit import STOPPED, leave
from droppeft.quantities import counted

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
        leave("stopped; nothing was written", STOPPED)
    measured = (
        "not evaluated in this round"
        if done.value is None
        else f"{done.metric} {done.value:.4f} on {counted(done.rows, 'test text')}"
    )
    typer.echo(f"round {done.round}, {measured}: {done.folder}\n\n{done.lines}", nl=False)


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
        leave("stopped; nothing was written", STOPPED)


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
        leave("stopped; nothing was written", STOPPED)
    typer.echo(written)
