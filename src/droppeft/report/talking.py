"""Talk to the model of a run, or let it complete a file of prompts. Ours."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from droppeft.data.conversations import Message
from droppeft.data.prompts import read_prompts
from droppeft.errors import DroppeftError
from droppeft.files import write_atomically
from droppeft.report.progress import bar
from droppeft.report.screen import Screen
from droppeft.runs.answering import Answering, loaded_model
from droppeft.tasks.generation import GenerationSettings

HELP = "Write a message. An empty line begins a new conversation; Ctrl-D ends."
YOU = "you   "
MODEL = "model "
EMPTY_ANSWER = "The answer is empty."


def talk(
    run: Path,
    settings: GenerationSettings,
    round: int | None = None,
    client: int | None = None,
    console: Console | None = None,
) -> None:
    """Read messages from the terminal and show the model's answers as they are generated.

    Args:
        run: folder of the run.
        settings: how answers are generated.
        round, client: as in :func:`~droppeft.runs.answering.loaded_model`.
        console: for messages; the answers go to standard output.

    Raises:
        DroppeftError: as :func:`~droppeft.runs.answering.loaded_model`.
    """
    console = console or Console()
    with loaded(run, settings, round, client, console) as answering:
        console.print(Text(HELP, style="dim"))
        _converse(answering, console)


@contextmanager
def loaded(
    run: Path,
    settings: GenerationSettings,
    round: int | None,
    client: int | None,
    console: Console,
) -> Iterator[Answering]:
    """Load the model of a run; the steps are shown, and that it is untrained if it is."""
    with ExitStack() as stack:
        with Screen(console) as screen:
            screen.preparing("loading the model")
            loading = loaded_model(run, settings, screen.preparing, round, client)
            answering = stack.enter_context(loading)
        if answering.round == 0:
            why = "" if round == 0 else ", since no round of the run is finished"
            console.print(Text(f"This is the model before training{why}.", style="yellow"))
        yield answering


def _converse(answering: Answering, console: Console) -> None:
    messages: list[Message] = []
    while True:
        try:
            said = console.input(Text(YOU, style="bold cyan")).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not said:
            messages = []
            console.print(Text("A new conversation.", style="dim"))
            continue
        messages.append(Message("user", said))
        console.print(Text(MODEL, style="bold green"), end="")
        try:
            [answer] = answering.answers([messages], _streamer(answering))
        except KeyboardInterrupt:
            console.print()
            messages.pop()
            continue
        except DroppeftError as error:
            console.print(Text(str(error), style="red"))
            messages.pop()
            continue
        if not answer.strip():
            console.print(Text(EMPTY_ANSWER, style="dim"))
        messages.append(Message("assistant", answer))


def _streamer(answering: Answering) -> Any:
    """Print an answer as it is generated."""
    from transformers import TextStreamer

    return TextStreamer(answering.tokenizer, skip_prompt=True, skip_special_tokens=True)


def complete_file(
    run: Path,
    prompts: Path,
    out: Path | None,
    settings: GenerationSettings,
    round: int | None = None,
    client: int | None = None,
) -> Path:
    """Let the model complete the prompts of a file, and write all at once.

    Args:
        run: folder of the run.
        prompts: file that :func:`~droppeft.data.prompts.read_prompts` reads.
        out: new JSON Lines file with the columns of ``prompts``, and ``completion``; beside
            ``prompts`` if ``None``.
        settings: how completions are generated.
        round, client: as in :func:`~droppeft.runs.answering.loaded_model`.

    Returns:
        The path of the new file.

    Raises:
        DroppeftError: the file exists already or cannot be written, the prompts cannot be read, or
            as :func:`~droppeft.runs.answering.loaded_model`.
    """
    out = out or prompts.with_name(f"{prompts.stem}-generated.jsonl")
    if out.exists():
        raise DroppeftError(f"{out}: exists already; choose another file with --out")
    if not out.absolute().parent.is_dir():
        raise DroppeftError(f"{out}: its folder does not exist; make it, or choose another --out")
    rows = read_prompts(prompts)
    console = Console(stderr=True)
    with loaded(run, settings, round, client, console) as answering:
        completions = _completed(answering, [prompt for _, prompt in rows], console)
    lines = (
        json.dumps({**row, "completion": text}, ensure_ascii=False, default=str) + "\n"
        for (row, _), text in zip(rows, completions, strict=True)
    )
    write_atomically(out, "".join(lines).encode())
    return out


def _completed(answering: Answering, prompts: list[Any], console: Console) -> list[str]:
    """The completions, in parts, so that progress can be shown."""
    size = answering.settings.batch_size
    texts: list[str] = []
    with bar(console) as progress:
        task = progress.add_task("prompts", total=len(prompts))
        for start in range(0, len(prompts), size):
            texts += answering.answers(prompts[start : start + size])
            progress.update(task, completed=len(texts))
    return texts
