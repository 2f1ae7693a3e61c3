"""Read a file of texts that a model shall classify. Ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from droppeft.config.task_detection import LABEL_COLUMNS, TEXT_COLUMNS
from droppeft.data.splits import Split, read_file
from droppeft.data.texts import TextTable
from droppeft.errors import DroppeftError


@dataclass(frozen=True)
class NewTexts:
    """The rows of a file.

    Attributes:
        rows: all columns.
        columns: of the text, or of both texts of a pair.
        texts: the text of each row.
        pairs: the second text of each row; ``None`` without one.
        label_column: the column of labels, if there is one.
        labels: the label of each row as a text, empty where it is missing; ``None`` without labels.
    """

    rows: pa.Table
    columns: tuple[str, ...]
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    label_column: str | None
    labels: tuple[str, ...] | None


def read_new_texts(path: Path, text: Sequence[str] = (), label: str | None = None) -> NewTexts:
    """Read a file with a column of texts, or two for pairs of texts.

    Args:
        path: a file of the types that runs read.
        text: names of the columns; if they are not given or not in the file, they are found by the
            usual names.
        label: name of the column of labels, which need not exist; without it the usual names count.

    Raises:
        DroppeftError: the file cannot be read, has no column of texts, or a text is empty.
    """
    if not path.is_file():
        raise DroppeftError(f"{path}: no such file")
    split = read_file(path)
    columns = _text_columns(split, text)
    values = [_texts(split, name) for name in columns]
    labels = [label] if label else list(LABEL_COLUMNS)
    found = next((one for name in labels if (one := _named(split, (name,)))), None)
    return NewTexts(
        rows=split.table,
        columns=columns,
        texts=values[0],
        pairs=values[1] if len(values) == 2 else None,
        label_column=found[0] if found else None,
        labels=_spelled(split.table[found[0]]) if found else None,
    )


def as_table(texts: Sequence[str], pairs: Sequence[str] | None) -> TextTable:
    """Return texts as a table whose labels are all 0."""
    labels = np.zeros(len(texts), np.int64)
    return TextTable(tuple(texts), None if pairs is None else tuple(pairs), labels)


def _text_columns(split: Split, wanted: Sequence[str]) -> tuple[str, ...]:
    if wanted and (found := _named(split, wanted)):
        return found
    usual = [names for names in TEXT_COLUMNS if not wanted or len(names) == len(wanted)]
    found = next((found for names in usual if (found := _named(split, names))), None)
    if found is not None:
        return found
    what = f"has no column {' and '.join(wanted)}" if wanted else "no column of texts found"
    raise DroppeftError(
        f"{split.where}: {what}, only {', '.join(split.table.column_names)}; "
        "name the column with --text"
    )


def _named(split: Split, names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the columns with these names, in any case."""
    present = {name.casefold(): name for name in reversed(split.table.column_names)}
    present |= {name: name for name in split.table.column_names}
    found = [present.get(name, present.get(name.casefold())) for name in names]
    return None if None in found else tuple(filter(None, found))


def _texts(split: Split, name: str) -> tuple[str, ...]:
    column = split.table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = tuple(column.to_pylist())
    for row, value in enumerate(values, start=1):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DroppeftError(f"{split.where}: {name} is empty in row {row}; remove the row")
        if not isinstance(value, str):
            raise DroppeftError(f"{split.where}: {name} has type {column.type}, not text")
    return values


def _spelled(column: pa.ChunkedArray) -> tuple[str, ...]:
    return tuple("" if value is None else str(value).strip() for value in column.to_pylist())
