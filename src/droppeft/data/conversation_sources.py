"""Load conversations and documents from the built-in data, the hub, a folder or a file. Ours."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from droppeft.config import SourceConfig
from droppeft.data.builtin_docstrings import load_builtin_docstrings
from droppeft.data.conversation_shapes import (
    SHAPES,
    BadRow,
    Shape,
    detect_shape,
    prompt_and_completion,
    single_text,
)
from droppeft.data.conversations import (
    Conversation,
    ConversationData,
    ConversationTable,
    Document,
    Example,
    content_of,
    prompt_of,
)
from droppeft.data.sources import (
    TEST_FRACTION,
    at_most,
    check_builtin_source,
    class_names,
    label_values,
    owners,
)
from droppeft.data.splits import Split, read_splits
from droppeft.data.texts import Rows
from droppeft.errors import DroppeftError

NO_CATEGORIES: tuple[str, ...] = ()


def load_conversations(data: str, source: SourceConfig, key: str | None = None) -> ConversationData:
    """Load a task for a causal language model.

    Args:
        data: one of:

            - ``builtin``: signatures of Python functions, and the first line of their docstrings;
            - a folder, a file or an id on the hub, as in
              :func:`~droppeft.data.splits.read_splits`. If there is no test split, the rows of a
              fifth of the prompts, chosen by a hash of the prompt, become one, so that no prompt is
              in both. Of documents, a fifth is chosen by a hash of the text.
        source: columns and splits, if they do not have the names in
            :data:`~droppeft.data.conversation_shapes.SHAPES` and ``TEST_SPLITS``; the column
            of categories (``label``), which are not read unless it is named; and the largest number
            of rows, as in :func:`~droppeft.data.sources.load_text`.
        key: column with the owner of each training row; ``package`` for the built-in data set.

    Raises:
        DroppeftError: the data cannot be found or read, no shape fits its columns, a row cannot be
            used, or there are too few rows for a test split.
    """
    whole = _builtin(source, key) if data == "builtin" else _from_splits(data, source, key)
    return replace(
        whole,
        train=at_most(whole.train, source.max_train_rows),
        test=at_most(whole.test, source.max_test_rows),
    )


def _builtin(source: SourceConfig, key: str | None) -> ConversationData:
    check_builtin_source(source, key)
    data = load_builtin_docstrings()
    train = data.train if key else replace(data.train, keys=None)
    return replace(data, train=train, test=replace(data.test, keys=None))


def _from_splits(data: str, source: SourceConfig, key: str | None) -> ConversationData:
    train, test = read_splits(data, source, needs_test=False)
    shape = _shape(train, source)
    splits = (train,) if test is None else (train, test)
    rows = [_examples(split, shape) for split in splits]
    labels, names = _categories(splits, source.label)
    table = ConversationTable(rows[0], labels[0], owners(train, key) if key else None)
    if test is None:
        table, held_out = _split(table, train.where)
    else:
        held_out = ConversationTable(rows[1], labels[1])
    return ConversationData(data, shape.name, table, held_out, names)


def _shape(split: Split, source: SourceConfig) -> Shape:
    if source.prompt is not None and source.completion is not None:
        return prompt_and_completion(source.prompt, source.completion)
    if source.text is not None:
        if len(source.text) != 1:
            raise DroppeftError("source.text must name one column for a causal language model")
        return single_text(source.text[0])
    name = detect_shape(split.table.column_names)
    if name is None:
        known = "; ".join(" with ".join(shape.required) for shape in SHAPES.values())
        raise DroppeftError(
            f"{split.where}: none of the known shapes fits its columns "
            f"{', '.join(split.table.column_names)}; known are: {known}; or name the columns with "
            "source.prompt and source.completion, or with source.text"
        )
    return SHAPES[name]


def _examples(split: Split, shape: Shape) -> tuple[Example, ...]:
    """Convert all rows; the first that cannot be used is named, and the others are counted."""
    present = split.table.column_names
    for name in shape.required:
        if present.count(name) != 1:
            split.column(name, f"needed for the shape {shape.name}")
    names = [*shape.required, *(name for name in shape.optional if name in present)]
    examples, bad = [], []
    for number, row in enumerate(split.table.select(names).to_pylist(), start=1):
        try:
            if missing := next((name for name in shape.required if row[name] is None), None):
                raise BadRow(f"{missing} is missing{_other_shape(split, number - 1)}")
            examples.append(shape.convert(row))
        except BadRow as reason:
            bad.append(f"row {number}: {reason}")
    if bad:
        others = f", and {len(bad) - 1:,} other rows cannot be used either" if bad[1:] else ""
        raise DroppeftError(f"{split.where}, {bad[0]}{others}; correct or remove them")
    return tuple(examples)


def _other_shape(split: Split, row: int) -> str:
    """Say so if a row has the columns of another shape."""
    [values] = split.table.slice(row, 1).to_pylist()
    other = detect_shape([name for name, value in values.items() if value is not None])
    if other is None:
        return ""
    return f" (the row has the shape {other}, and all rows of a file must have the same)"


def _categories(splits: Sequence[Split], label: str | None) -> tuple[list[Rows], tuple[str, ...]]:
    """Return the category of every row, for each split, and the names of the categories."""
    if label is None:
        return [np.zeros(split.table.num_rows, np.int64) for split in splits], NO_CATEGORIES
    values = [label_values(split, label) for split in splits]
    if len({one.dtype.kind for one in values}) > 1:
        raise DroppeftError(
            f"{label} is a number in only one of {' and '.join(split.where for split in splits)}; "
            "use the same type"
        )
    classes = np.unique(np.concatenate(values))
    labels = [np.searchsorted(classes, one).astype(np.int64) for one in values]
    return labels, class_names(classes, splits[0].table.schema, label)


def _split(table: ConversationTable, where: str) -> tuple[ConversationTable, ConversationTable]:
    held_out = _test_rows(table)
    if not held_out.any():
        raise DroppeftError(f"{where} has too few rows for a test split; add rows or a test file")
    test = replace(table.take(np.flatnonzero(held_out)), keys=None)
    return table.take(np.flatnonzero(~held_out)), test


def _test_rows(table: ConversationTable) -> npt.NDArray[np.bool_]:
    """Select all rows of the fifth of each category's prompts that have the smallest hashes."""
    hashes = np.array([_hash_of_prompt(row) for row in table.rows])
    chosen: set[str] = set()
    for label in np.unique(table.labels):
        distinct = np.unique(hashes[table.labels == label])
        chosen.update(distinct[: round(TEST_FRACTION * len(distinct))])
    return np.isin(hashes, sorted(chosen))


def _hash_of_prompt(row: Example) -> str:
    content = row.text if isinstance(row, Document) else content_of(Conversation(prompt_of(row)))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
