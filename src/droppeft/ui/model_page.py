"""A page to try the model of a run: the class of a text, or a chat. Ours."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from droppeft.data.conversations import Message
from droppeft.errors import DroppeftError
from droppeft.quantities import counted
from droppeft.report.result_html import short_name
from droppeft.report.screen import Screen
from droppeft.report.talking import EMPTY_ANSWER, loaded
from droppeft.runs.answering import Answering
from droppeft.runs.folder import RESULT, saved_config
from droppeft.runs.predicting import Predictor, load_predictor
from droppeft.runs.streaming import stream_answer
from droppeft.runs.trained_columns import trained_columns
from droppeft.tasks.generation import GenerationSettings
from droppeft.tasks.registry import task_named
from droppeft.ui.local_page import load_gradio, serve_page

CLASSES_SHOWN = 10
LONGEST_ANSWER, WARMEST = 1024, 2.0
"""The right ends of the sliders of a chat, unless the command's options are larger."""


def serve_model(
    run: Path,
    settings: GenerationSettings,
    host: str,
    port: int | None,
    round: int | None = None,
    client: int | None = None,
) -> None:
    """Serve a page for the model of a run until Ctrl-C.

    Args:
        run: folder of the run.
        settings: how a language model answers at first; the page can change them.
        host, port: as in :func:`~droppeft.ui.local_page.serve_page`.
        round, client: as in :func:`~droppeft.runs.answering.loaded_model`.

    Raises:
        DroppeftError: as :func:`~droppeft.runs.answering.loaded_model`,
            :func:`~droppeft.runs.predicting.load_predictor` or
            :func:`~droppeft.ui.local_page.serve_page`.
    """
    console = Console()
    if task_named(saved_config(run).task).generates:
        with loaded(run, settings, round, client, console) as answering:
            serve_page(chat_page(answering, title_of(run, answering.round, client)), host, port)
        return
    with Screen(console) as screen:
        screen.preparing("loading the model")
        predictor = load_predictor(run, screen.preparing, round, client)
    title = title_of(run, predictor.source.round, client)
    serve_page(class_page(predictor, text_labels(run), title), host, port)


def title_of(run: Path, round: int, client: int | None) -> str:
    """Whose model it is, as a heading in Markdown."""
    config = saved_config(run)
    whose = "Global model" if client is None else f"Model of client {client}"
    when = f"after round {round}" if round else "before training"
    return f"## {whose} {when}\n{config.method} · {short_name(config.data)} · `{run}`"


# Classes


def text_labels(run: Path) -> tuple[str, ...]:
    """The name of each text of a row, as far as the run's folder tells."""
    known = trained_columns(run).text
    if known or (run / RESULT).is_file() or saved_config(run).data == "builtin":
        return known or ("text",)
    return ("text", "second text, if the model was trained on pairs")


def class_page(predictor: Predictor, labels: Sequence[str], title: str) -> Any:
    """Return a page with a field for each text, and the probability of each class."""
    gr = load_gradio()

    def classify(*texts: str) -> dict[str, float]:
        with _sentences(gr):
            return probabilities(predictor, texts)

    with gr.Blocks(title="droppeft serve", analytics_enabled=False) as page:
        gr.Markdown(title + measured(predictor))
        with gr.Row():
            with gr.Column():
                fields = [
                    gr.Textbox(label=label, lines=4, max_lines=16, autofocus=not number)
                    for number, label in enumerate(labels)
                ]
                button = gr.Button("Classify", variant="primary")
            with gr.Column():
                label = gr.Label(label="Class", num_top_classes=CLASSES_SHOWN)
        gr.on(
            [button.click, *(field.submit for field in fields)],
            classify,
            fields,
            label,
            api_name="classify",
        )
    return page


def probabilities(predictor: Predictor, texts: Sequence[str]) -> dict[str, float]:
    """Return the probability of each class for a text, or for a pair of texts.

    Raises:
        DroppeftError: a text is missing, or as
            :meth:`~droppeft.runs.predicting.Predictor.probabilities`.
    """
    first, *second = texts
    if not first.strip():
        raise DroppeftError("the text is empty; type some words")
    pairs = [text for text in second if text.strip()]
    [found] = predictor.probabilities([first], pairs or None)
    return dict(zip(predictor.label_names, found.tolist(), strict=True))


def measured(predictor: Predictor) -> str:
    """What the run has measured of the global model, to be added to a title."""
    source = predictor.source
    if source.value is None or source.client is not None:
        return ""
    metric = source.task.metrics[0]
    texts = counted(source.rows, "test text")
    return f" · {metric.label} {metric.text(source.value)} on {texts}"


# Chat


def chat_page(answering: Answering, title: str) -> Any:
    """Return a page to talk to a language model; an answer is shown while it is generated."""
    gr = load_gradio()
    given = answering.settings

    def answer(
        said: str, history: Sequence[Mapping[str, Any]], temperature: float, most: float
    ) -> Iterator[Any]:
        settings = replace(given, temperature=temperature, max_new_tokens=int(most))
        messages = [*messages_of(history), Message("user", said)]
        text = ""
        with _sentences(gr):
            for text in stream_answer(answering.with_settings(settings), messages):
                yield text
        if not text.strip():  # gradio would show nothing
            yield gr.ChatMessage(text, metadata={"title": EMPTY_ANSWER, "status": "done"})

    most = min(max(LONGEST_ANSWER, given.max_new_tokens), answering.positions - 1)
    warmest = max(WARMEST, given.temperature)
    with gr.Blocks(title="droppeft serve", analytics_enabled=False, fill_height=True) as page:
        gr.Markdown(title)
        gr.ChatInterface(
            answer,
            # Texts are shown as they are, and without gradio's button to share them.
            chatbot=gr.Chatbot(
                show_label=False,
                buttons=["copy", "copy_all"],
                render_markdown=False,
                scale=1,
                render=False,
            ),
            additional_inputs=[
                gr.Slider(
                    0,
                    warmest,
                    given.temperature,
                    step=0.05,
                    label="Temperature",
                    info="0: the most probable token; above: tokens are drawn.",
                    render=False,
                ),
                gr.Slider(
                    1,
                    most,
                    given.max_new_tokens,
                    step=1,
                    label="Most tokens of an answer",
                    render=False,
                ),
            ],
            additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            concurrency_limit=1,  # the model does one answer at a time
            api_name="chat",
        )
    return page


def messages_of(history: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages of a chat, as gradio has them: a content is a text, or a list of parts."""
    return [Message(entry["role"], _text_of(entry["content"])) for entry in history]


def _text_of(content: Any) -> str:
    parts = [content] if isinstance(content, str | Mapping) else content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)


@contextmanager
def _sentences(gr: Any) -> Iterator[None]:
    """Show an error of droppeft as its sentence, in a corner of the page."""
    try:
        yield
    except DroppeftError as error:
        raise gr.Error(str(error), print_exception=False) from None
