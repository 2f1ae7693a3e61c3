"""The answer of a run's model while it is generated. Ours."""

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from transformers import TextStreamer

from droppeft.data.conversations import Message
from droppeft.runs.answering import Answering


def stream_answer(answering: Answering, messages: Sequence[Message]) -> Iterator[str]:
    """Yield the answer to messages so far, each time longer; the last one is the whole answer.

    The model works in a thread of its own. Closing the iterator stops it.

    Args:
        answering: the model, which nothing else may use meanwhile.
        messages: of which the last is not the assistant's.

    Raises:
        DroppeftError: as :meth:`~droppeft.runs.answering.Answering.answers`.
    """
    streamer = _Streamer(answering.tokenizer, skip_prompt=True, skip_special_tokens=True)
    outcome: list[str | Exception] = []
    thread = Thread(target=_generate, args=(answering, messages, streamer, outcome), daemon=True)
    thread.start()
    try:
        text = ""
        while (piece := streamer.pieces.get()) is not None:
            text += piece
            yield text
        [found] = outcome
        if isinstance(found, Exception):
            raise found
        yield found
    finally:
        streamer.stopped.set()
        thread.join()


def _generate(
    answering: Answering,
    messages: Sequence[Message],
    streamer: "_Streamer",
    outcome: list[str | Exception],
) -> None:
    try:
        outcome += answering.answers([messages], streamer)
    except Exception as error:  # raised again where the pieces are read
        outcome.append(error)
    finally:
        streamer.pieces.put(None)


class _Stopped(Exception):
    """Nobody reads the answer any more."""


class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers ships no types
    """Puts finished words into a queue; ends the generation when it is told to."""

    def __init__(self, tokenizer: Any, **how: Any) -> None:
        super().__init__(tokenizer, **how)
        self.pieces: SimpleQueue[str | None] = SimpleQueue()
        self.stopped = Event()

    def put(self, value: Any) -> None:
        """Take the next tokens."""
        if self.stopped.is_set():
            raise _Stopped
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take words that will not change any more."""
        self.pieces.put(text)
