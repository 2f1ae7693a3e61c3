"""Read prompts that a model shall complete. Ours."""

from pathlib import Path
from typing import Any

from droppeft.data.conversation_shapes import BadRow, Row, messages_of
from droppeft.data.conversations import Message
from droppeft.data.splits import read_file
from droppeft.errors import DroppeftError

Prompt = tuple[Message, ...]

COLUMNS = ("prompt", "messages", "conversations", "instruction", "text")
"""Columns with prompts; the first that exists is read. Beside ``instruction``, ``input`` or
``context`` is read too."""


def read_prompts(path: Path) -> list[tuple[dict[str, Any], Prompt]]:
    """Read a file of prompts, of a type in :data:`~droppeft.table_files.SUFFIXES`.

    A prompt is a text, or a list of messages of which the last is not the assistant's.

    Returns:
        For each row its columns, and the prompt.

    Raises:
        DroppeftError: the file cannot be read, has no column of prompts, or a row has none.
    """
    if not path.is_file():
        raise DroppeftError(f"{path}: no such file")
    split = read_file(path)
    present = split.table.column_names
    column = next((name for name in COLUMNS if name in present), None)
    if column is None:
        raise DroppeftError(
            f"{path}: has no column of prompts ({', '.join(COLUMNS)}), only {', '.join(present)}; "
            "rename one"
        )
    found = []
    for number, row in enumerate(split.table.to_pylist(), start=1):
        try:
            found.append((row, _prompt(row, column)))
        except BadRow as error:
            raise DroppeftError(f"{path}: row {number}{split.numbering}: {error}") from None
    return found


def _prompt(row: Row, column: str) -> Prompt:
    value = row[column]
    if isinstance(value, list):
        messages = messages_of(value, column)
        if not messages or messages[-1].role == "assistant":
            raise BadRow(f"{column} does not end with a message to answer")
        return tuple(messages)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{column} is empty")
    if column == "instruction":
        more = row.get("input") or row.get("context") or ""
        value = "\n\n".join(part for part in (value, more) if part.strip())
    return (Message("user", value),)
