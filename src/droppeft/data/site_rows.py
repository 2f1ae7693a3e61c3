"""Read the rows of a site: a client whose rows are its own, and not a part of a larger table. Ours.

Labels are matched to the classes of the task. A site's rows are split without regard to others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from droppeft.config import SourceConfig
from droppeft.data.checks import compared
from droppeft.data.columns import find_columns
from droppeft.data.conversation_sources import hashes_of_prompts, read_conversations
from droppeft.data.conversations import ConversationTable
from droppeft.data.findings import Findings
from droppeft.data.labelled_cells import Cells, findings_of, lacking_of, read_cells, table_of
from droppeft.data.labels import LabelColumn, indices_of, ordered
from droppeft.data.missing_values import kept_rows
from droppeft.data.partition import ClientRows
from droppeft.data.sources import Table, at_most, contents_of, hashes_of
from droppeft.data.splits import Part, read_parts
from droppeft.data.texts import Rows, TextTable
from droppeft.errors import DroppeftError

Hashes = npt.NDArray[np.str_]


@dataclass(frozen=True)
class SiteSource:
    """What a site says about its rows.

    Attributes:
        data: a file, or a folder whose files are named after splits.
        source: columns and splits, if they are not found, and what to do about missing values.
        labels: the task's name of each label that has another one at the site.
        validation_fraction, test_fraction: shares of the rows that validate and test, where the
            data have no such splits.
    """

    data: str
    source: SourceConfig
    labels: Mapping[str, str]
    validation_fraction: float
    test_fraction: float


@dataclass(frozen=True)
class UnknownLabel:
    """Rows of a site that are left out, since their label is no class of the task.

    Attributes:
        label: as it is spelled.
        where: the file of the rows.
        rows: their indices in this file, from 0.
        numbering: how rows are counted, to follow their numbers.
    """

    label: str
    where: str
    rows: Rows
    numbering: str


@dataclass(frozen=True)
class SiteRows:
    """The rows of a site that can be used.

    Attributes:
        table: of all splits, one after another.
        rows: indices of the rows to train, validate and test. A part is empty if there are too few
            different texts.
        label_names: names of the classes in their order; empty for a task without classes.
        shape: how the rows are stored.
        columns: names of all columns of the training rows.
        findings: what reading found and did.
        unknown: rows that are left out, by their label.
    """

    table: TextTable | ConversationTable
    rows: ClientRows
    label_names: tuple[str, ...]
    shape: str
    columns: tuple[str, ...]
    findings: Findings
    unknown: tuple[UnknownLabel, ...] = ()

    def __len__(self) -> int:
        return len(self.table)


def read_site_texts(site: SiteSource, classes: Sequence[str] | None) -> SiteRows:
    """Read the labelled texts of a site.

    Args:
        site: where they are.
        classes: names of the task's classes in their order; ``None`` takes those of the rows.

    Raises:
        DroppeftError: the data cannot be found or read, a column is not found, rows lack a value
            and ``source.missing`` is ``error``, or ``labels`` names a class that does not exist.
    """
    if classes is not None:
        _check_names(site.labels, classes)
    splits = read_parts(site.data, site.source)
    columns = find_columns(splits["train"], site.source, in_node_file=True)
    cells = [
        _renamed(read_cells(split, columns, site.source), site.labels) for split in splits.values()
    ]
    lacking = lacking_of(cells, columns, known=classes or (), test=splits.get("test"))
    kept, missing = kept_rows(lacking, site.source.missing)
    if classes is None:
        pairs = zip(cells, kept, strict=True)
        classes = ordered(one.labels.values[row] for one, rows in pairs for row in rows)
    tables: dict[Part, TextTable] = {}
    unknown: list[UnknownLabel] = []
    for part, one, rows in zip(splits, cells, kept, strict=True):
        labels = _classes_of(one, rows, classes)
        unknown += _unknown(one, rows[labels < 0])
        tables[part] = table_of(one, rows[labels >= 0], labels[labels >= 0])
    tables = _limited(tables, site.source)
    findings = replace(
        findings_of(cells, columns, None, missing),
        beyond_limit=sum(map(len, kept)) - sum(len(one.rows) for one in unknown) - _rows(tables),
    )
    empty: Sequence[str] = ()
    test = contents_of(tables["test"]) if "test" in tables else empty
    return SiteRows(
        TextTable.joined(tuple(tables.values())),
        _split(tables, hashes_of(tables["train"]), site),
        tuple(classes),
        "text pairs with labels" if tables["train"].pairs else "texts with labels",
        tuple(splits["train"].table.column_names),
        compared(findings, contents_of(tables["train"]), test, tables["train"].labels),
        tuple(unknown),
    )


def read_site_conversations(site: SiteSource) -> SiteRows:
    """Read the conversations or documents of a site.

    Args:
        site: where they are.

    Raises:
        DroppeftError: the data cannot be found or read, no shape fits their columns, a row cannot
            be used, or names of labels are given.
    """
    if site.labels:
        raise DroppeftError("labels has no effect with a task that has no classes; leave it out")
    splits = read_parts(site.data, site.source)
    read, shape, _, findings = read_conversations(tuple(splits.values()), site.source)
    tables = _limited(dict(zip(splits, read, strict=True)), site.source)
    train = tables["train"]
    findings = replace(findings, beyond_limit=sum(map(len, read)) - _rows(tables))
    return SiteRows(
        ConversationTable.joined(tuple(tables.values())),
        _split(tables, hashes_of_prompts(train), site),
        (),
        shape,
        tuple(splits["train"].table.column_names),
        compared(
            findings, train.rows, tables["test"].rows if "test" in tables else (), train.labels
        ),
    )


# Labels


def _check_names(renamed: Mapping[str, str], classes: Sequence[str]) -> None:
    for name, meant in renamed.items():
        if meant not in classes:
            raise DroppeftError(
                f"labels: {name} stands for {meant}, which is no class of the task; its classes "
                f"are {', '.join(classes)}"
            )


def _renamed(cells: Cells, names: Mapping[str, str]) -> Cells:
    values = tuple(names.get(value, value) for value in cells.labels.values)
    return replace(cells, labels=LabelColumn(values, cells.labels.stripped, ()))


def _classes_of(cells: Cells, rows: Rows, classes: Sequence[str]) -> Rows:
    """The class of each row; -1 if its label is none."""
    values = [cells.labels.values[row] for row in rows]
    index = indices_of(values, classes)
    return np.array([index.get(value, -1) for value in values], np.int64)


def _unknown(cells: Cells, rows: Rows) -> list[UnknownLabel]:
    values = np.array([cells.labels.values[row] for row in rows])
    split = cells.split
    return [
        UnknownLabel(str(label), split.where, rows[values == label], split.numbering)
        for label in np.unique(values)
    ]


# Parts


def _limited(tables: dict[Part, Table], source: SourceConfig) -> dict[Part, Table]:
    """At most as many rows to train and test as the site's settings say."""
    most = {"train": source.max_train_rows, "test": source.max_test_rows}
    return {part: at_most(table, most.get(part)) for part, table in tables.items()}


def _rows(tables: Mapping[Part, TextTable] | Mapping[Part, ConversationTable]) -> int:
    return sum(map(len, tables.values()))


def _split(
    tables: Mapping[Part, TextTable] | Mapping[Part, ConversationTable],
    hashes: Sequence[str],
    site: SiteSource,
) -> ClientRows:
    """The rows of each part, in the joined table.

    A part that has no split of its own gets some of the training rows, of each label if it has
    enough. Rows with one hash are in the same part.

    Args:
        tables: the rows of each split, in the order in which they are joined.
        hashes: of the training rows.
        site: has the shares of the parts.
    """
    ends = np.cumsum([0, *(len(table) for table in tables.values())])
    given = {part: np.arange(ends[place], ends[place + 1]) for place, part in enumerate(tables)}
    every, labels = np.array(hashes, dtype="<U64"), tables["train"].labels
    nobody: set[str] = set()
    test = nobody if "test" in tables else _drawn(every, labels, site.test_fraction, nobody)
    validation = (
        nobody if "validation" in tables else _drawn(every, labels, site.validation_fraction, test)
    )
    rows = [np.flatnonzero(np.isin(every, sorted(some))) for some in (test, validation)]
    return ClientRows(
        train=np.flatnonzero(~np.isin(every, sorted(test | validation))),
        validation=given.get("validation", rows[1]),
        test=given.get("test", rows[0]),
    )


def _drawn(hashes: Hashes, labels: Rows, share: float, others: set[str]) -> set[str]:
    """Draw a share of the distinct hashes, the smallest of each label that are not among others.

    If that is too few, because labels have few hashes, the smallest of all labels are drawn too.
    """
    distinct = np.unique(hashes)
    drawn: set[str] = set()
    for label in np.unique(labels):
        of_label = np.unique(hashes[labels == label])
        free = of_label[~np.isin(of_label, sorted(others))]
        drawn.update(free[: round(share * len(of_label))].tolist())
    free = distinct[~np.isin(distinct, sorted(others | drawn))]
    wanted = max(1, int(share * len(distinct)))
    return drawn | {*free[: max(0, wanted - len(drawn))].tolist()}
