"""Read a file of texts that a model shall classify. Ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from droppeft.data.cells import Unsuitable, spelled
from droppeft.data.columns import LABEL_COLUMNS, TEXT_COLUMNS, named_columns
from droppeft.data.labels import read_labels
from droppeft.data.missing_values import Mask
from droppeft.data.splits import Split, read_file
from droppeft.data.texts import TextTable
from droppeft.errors import DroppeftError
from droppeft.quantities import counted


@dataclass(frozen=True)
class NewTexts:
    """The rows of a file.

    Attributes:
        rows: all columns.
        columns: of the text, or of both texts of a pair.
        instead_of: columns that the run has read and the file lacks, so that ``columns`` were
            found by a usual name; empty otherwise.
        texts: the text of each row, empty where it is missing.
        pairs: the second text of each row; ``None`` without one.
        complete: whether each row has its texts, shape (rows,).
        label_column: the column of labels, if there is one.
        labels: the label of each row as a text, empty where it is missing; ``None`` without labels.
    """

    rows: pa.Table
    columns: tuple[str, ...]
    instead_of: tuple[str, ...]
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    complete: Mask
    label_column: str | None
    labels: tuple[str, ...] | None


def read_new_texts(
    path: Path,
    text: Sequence[str] = (),
    label: str | None = None,
    *,
    trained: Sequence[str] = (),
) -> NewTexts:
    """Read a file with a column of texts, or two for pairs of texts.

    Args:
        path: a file of the types that runs read.
        text: names of the columns, which must be in the file; without them, those of ``trained``
            or else the usual names count.
        label: name of the column of labels, which need not exist; without it the usual names count.
        trained: names of the columns that the run has read, as far as they are known. The texts
            have as many columns.

    Raises:
        DroppeftError: the file cannot be read, has no column of texts, or no row has a text.
    """
    if not path.is_file():
        raise DroppeftError(f"{path}: no such file")
    split = read_file(path)
    columns = _text_columns(split, text, trained)
    values = [_texts(split, name) for name in columns]
    complete = np.all([[bool(one.strip()) for one in column] for column in values], axis=0)
    if not complete.any():
        raise DroppeftError(f"{split.where}: {' or '.join(columns)} is empty in every row")
    names = split.table.column_names
    lacks_trained = not text and trained and named_columns(names, trained) is None
    wanted = [label] if label else LABEL_COLUMNS
    found = next((one for name in wanted if (one := named_columns(names, (name,)))), None)
    return NewTexts(
        rows=split.table,
        columns=columns,
        instead_of=tuple(trained) if lacks_trained else (),
        texts=values[0],
        pairs=values[1] if len(values) == 2 else None,
        complete=complete,
        label_column=found[0] if found else None,
        labels=read_labels(split, found[0], strip=True).values if found else None,
    )


def as_table(texts: Sequence[str], pairs: Sequence[str] | None) -> TextTable:
    """Return texts as a table whose labels are all 0."""
    labels = np.zeros(len(texts), np.int64)
    return TextTable(tuple(texts), None if pairs is None else tuple(pairs), labels)


def _text_columns(split: Split, given: Sequence[str], trained: Sequence[str]) -> tuple[str, ...]:
    names = split.table.column_names
    if given and trained and len(given) != len(trained):
        raise DroppeftError(
            f"--text {','.join(given)}: the model was trained on texts from "
            f"{counted(len(trained), 'column')} ({', '.join(trained)}); name as many"
        )
    wanted = given or trained
    if wanted and (found := named_columns(names, wanted)):
        return found
    usual = [one for one in TEXT_COLUMNS if not trained or len(one) == len(trained)]
    found = next((found for one in usual if (found := named_columns(names, one))), None)
    if found is not None and not given:
        return found
    what = f"no column {' or '.join(wanted)}" if wanted else "no column of texts found"
    raise DroppeftError(
        f"{split.where}: {what}, only {', '.join(names)}; name the column with --text"
    )


def _texts(split: Split, name: str) -> tuple[str, ...]:
    try:
        return tuple(spelled(split.column(name, "--text")))
    except Unsuitable as kind:
        raise DroppeftError(f"{split.where}: {name} has type {kind}, not text") from None
