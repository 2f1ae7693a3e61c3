"""Texts, labels and owners of a split as they are read, and what its rows lack. Ours."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from droppeft.config import SourceConfig
from droppeft.data.cells import Unsuitable, spelled
from droppeft.data.checks import dropped
from droppeft.data.columns import TextColumns
from droppeft.data.findings import Findings
from droppeft.data.labels import LabelColumn, read_labels, without_class
from droppeft.data.missing_values import Lacking, Mask
from droppeft.data.splits import Split
from droppeft.data.texts import Rows, TextTable
from droppeft.errors import DroppeftError


@dataclass(frozen=True)
class Cells:
    """The values of a split that are read, of all its rows.

    Attributes:
        split: the split.
        texts: the text of each row, or both texts of a pair.
        labels: the label of each row.
        owners: the owner of each row, if it is asked for.
    """

    split: Split
    texts: tuple[Sequence[str], ...]
    labels: LabelColumn
    owners: Sequence[str] | None = None


def read_cells(split: Split, columns: TextColumns, source: SourceConfig) -> Cells:
    """Read texts and labels of a split.

    Raises:
        DroppeftError: a column does not exist or has values of another type.
    """
    return Cells(
        split,
        tuple(_texts(split, column) for column in columns.text),
        read_labels(split, columns.label, strip=source.strip_labels),
    )


def findings_of(
    cells: Sequence[Cells], columns: TextColumns, key: str | None, missing: Counter[str]
) -> Findings:
    """Return what reading found, before rows are compared."""
    remarks = dict.fromkeys(text for one in cells for text in one.split.remarks)
    if columns.by_content:
        remarks[
            f"the columns were found by what they hold: text in {columns.text[0]}, label in "
            f"{columns.label}"
        ] = None
    findings = Findings(
        remarks=tuple(remarks),
        columns=_roles(columns.text, columns.label, key),
        rows_read=sum(one.split.table.num_rows for one in cells),
        stripped_labels=sum(one.labels.stripped for one in cells),
    )
    return dropped(findings, missing)


def _roles(text: Sequence[str], label: str, key: str | None) -> dict[str, str]:
    names = ("text",) if len(text) == 1 else ("first text", "second text")
    roles = {**dict(zip(names, text, strict=True)), "label": label}
    return {**roles, "owner": key} if key else roles


def lacking_of(
    cells: Sequence[Cells],
    columns: TextColumns,
    key: str | None = None,
    *,
    known: Collection[str] = (),
    test: Split | None = None,
) -> list[Lacking]:
    """Return which rows of each split lack what; labels that stand for no class are missing too.

    Args:
        cells: of each split.
        columns: from which they were read.
        key: column of the owners, if they were asked for.
        known: labels that stand for a class.
        test: the split instead of which another one may be named, if there is such.
    """
    every = {value for one in cells for value in one.labels.values}
    words, hidden = without_class({*every, *known})
    classless = (words - {*known}, hidden - {*known})
    return [_lacking(one, columns, key, classless, one.split is test) for one in cells]


def _lacking(
    cells: Cells,
    columns: TextColumns,
    key: str | None,
    classless: tuple[frozenset[str], frozenset[str]],
    is_test: bool,
) -> Lacking:
    """Which rows lack what."""
    label, (words, hidden) = columns.label, classless
    blank = np.zeros(cells.split.table.num_rows, bool)
    for column in cells.texts:
        blank |= _mask([not value or value.isspace() for value in column])
    labels = cells.labels.values
    rows = {
        "text": (f"{' or '.join(columns.text)} is missing", blank),
        "label": (
            f"{label} is missing",
            _mask([not one or one.isspace() or one in words for one in labels]),
        ),
    }
    secret = _mask([value in hidden for value in labels])
    if secret.any():
        also = "missing or " if rows["label"][1].any() else ""
        rows["label"] = (f"{label} is {also}-1, a hidden label,", rows["label"][1] | secret)
    if cells.owners is not None and key:
        rows["owner"] = (f"{key} is missing", _mask([not owner for owner in cells.owners]))
    advice = "write labels (text if -1 is a class)"
    another = ", name a split that has them with source.test" if is_test else ""
    return Lacking(cells.split, rows, f"{advice}{another}" if secret.any() else "")


def _mask(values: list[bool]) -> Mask:
    return np.array(values, bool)


def table_of(cells: Cells, rows: Rows, labels: Rows) -> TextTable:
    """Return the table of some rows of a split.

    Args:
        cells: of the split.
        rows: indices of n rows.
        labels: the class of each of them, shape (n,).
    """
    texts = [tuple(column[row] for row in rows) for column in cells.texts]
    return TextTable(
        texts=texts[0],
        pairs=texts[1] if len(texts) == 2 else None,
        labels=labels,
        keys=None if cells.owners is None else tuple(cells.owners[row] for row in rows),
    )


def _texts(split: Split, name: str) -> Sequence[str]:
    try:
        return spelled(split.column(name, "source.text"))
    except Unsuitable as kind:
        raise DroppeftError(f"{split.where}: {name} has type {kind}, not text") from None
