"""Recognise conversations and documents by their columns, and convert rows of each shape.

``prompt`` with ``completion``, ``messages`` and ``text`` are the shapes of TRL's SFTTrainer, Alpaca
(``instruction``, ``input``, ``output``), Dolly (``instruction``, ``context``, ``response``) and
ShareGPT (``conversations``) those of the data sets with these names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from droppeft.data.conversations import Conversation, Document, Example, Message, Role

Row = Mapping[str, Any]


class BadRow(Exception):
    """A row that cannot be used; the message says why, to be read after the row's number."""


class EmptyRow(BadRow):
    """A row that lacks its text."""


@dataclass(frozen=True)
class Shape:
    """Columns that together hold a conversation or a document.

    Attributes:
        name: as it is shown to the user.
        required: columns that must exist.
        optional: columns that are read if they exist.
        convert: makes an example from a row of these columns; raises :class:`BadRow`.
    """

    name: str
    required: tuple[str, ...]
    convert: Callable[[Row], Example]
    optional: tuple[str, ...] = ()


def detect_shape(column_names: Sequence[str]) -> str | None:
    """Return the name of the first shape in ``SHAPES`` whose columns exist; ``None`` if none fits.

    A table with a text column and a label column may be meant for classification, also if it has
    the shape ``text``.
    """
    present = set(column_names)
    return next((name for name, one in SHAPES.items() if present.issuperset(one.required)), None)


def prompt_and_completion(prompt: str, completion: str) -> Shape:
    """Return the shape of a table whose prompts and completions are in the given columns."""

    def convert(row: Row) -> Conversation:
        before, after = row[prompt], row[completion]
        if isinstance(before, str) and isinstance(after, str):
            return _conversation([Message("user", before), _answer(after, completion)])
        if isinstance(before, list) and isinstance(after, list):
            return _conversation([*messages_of(before, prompt), *messages_of(after, completion)])
        raise BadRow(f"{prompt} and {completion} are neither both text nor both lists of messages")

    return Shape("prompt/completion", (prompt, completion), convert)


def single_text(column: str) -> Shape:
    """Return the shape of a table of documents in the given column."""

    def convert(row: Row) -> Document:
        text = _text(row[column], column)
        if not text.strip():
            raise EmptyRow(f"{column} is empty")
        return Document(text)

    return Shape("text", (column,), convert)


def _list_of_messages(column: str) -> Shape:
    def convert(row: Row) -> Conversation:
        if not isinstance(row[column], list):
            raise BadRow(f"{column} is not a list of messages")
        return _conversation(messages_of(row[column], column))

    return Shape(column, (column,), convert)


def _instruction(name: str, context: str, answer: str) -> Shape:
    """An instruction, which a blank line separates from what it is about, and the answer."""

    def convert(row: Row) -> Conversation:
        parts = [_text(row["instruction"], "instruction"), _text(row.get(context) or "", context)]
        prompt = "\n\n".join(part for part in parts if part.strip())
        return _conversation([Message("user", prompt), _answer(row[answer], answer)])

    return Shape(name, ("instruction", answer), convert, (context,))


SHAPES = {
    "messages": _list_of_messages("messages"),
    "ShareGPT": _list_of_messages("conversations"),
    "prompt/completion": prompt_and_completion("prompt", "completion"),
    "Alpaca": _instruction("Alpaca", "input", "output"),
    "Dolly": _instruction("Dolly", "context", "response"),
    "text": single_text("text"),
}
"""By name; the first that fits is used, since Alpaca's own file also has a column ``text``."""

ROLES: dict[str, Role] = {
    **{role: role for role in get_args(Role)},
    "human": "user",
    "gpt": "assistant",
}
"""By the names that data sets use; ``human`` and ``gpt`` are ShareGPT's."""


def messages_of(values: Sequence[Any], column: str) -> list[Message]:
    """Return a list of messages from objects with role and content; raises :class:`BadRow`."""
    return [_message(value, f"message {n} of {column}") for n, value in enumerate(values, start=1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow(f"{where} is not an object with role and content")
    named = value.get("role") if value.get("role") is not None else value.get("from")
    content = value.get("content") if value.get("content") is not None else value.get("value")
    if named is None:
        raise BadRow(f"{where} has no role")
    if named not in ROLES:
        raise BadRow(f"{where} has the unknown role {named}; known are {', '.join(ROLES)}")
    role = ROLES[named]
    return _answer(content, where) if role == "assistant" else Message(role, _text(content, where))


def _answer(value: Any, where: str) -> Message:
    text = _text(value, where)
    if not text.strip():
        raise EmptyRow(f"{where} is an empty completion")
    return Message("assistant", text)


def _text(value: Any, where: str) -> str:
    if value is None:
        raise EmptyRow(f"{where} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{where} is not text")
    return value


def _conversation(messages: Sequence[Message]) -> Conversation:
    if all(message.role != "assistant" for message in messages):
        raise BadRow("no message is the assistant's, so there is nothing to learn")
    return Conversation(tuple(messages))
