"""Load conversations and documents from the built-in data, the hub, a folder or a file. Ours."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from droppeft.config import SourceConfig
from droppeft.data.builtin_docstrings import load_builtin_docstrings
from droppeft.data.checks import compared, dropped
from droppeft.data.conversation_shapes import (
    SHAPES,
    BadRow,
    EmptyRow,
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
from droppeft.data.findings import Findings
from droppeft.data.labels import LabelColumn, indices_of, ordered, read_labels, without_class
from droppeft.data.missing_values import Lacking, Rule, kept_rows
from droppeft.data.sources import at_most, check_builtin_source, owners, with_smallest_hashes
from droppeft.data.splits import Split, read_splits, read_test_split
from droppeft.data.texts import Rows
from droppeft.errors import DroppeftError

SPLIT_BY_US = "there is no test split, so the rows of a fifth of the prompts are held out"


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
    train = at_most(whole.train, source.max_train_rows)
    test = at_most(whole.test, source.max_test_rows)
    beyond = len(whole.train) + len(whole.test) - len(train) - len(test)
    findings = replace(whole.findings, beyond_limit=beyond)
    findings = compared(findings, train.rows, test.rows, np.zeros(len(train), np.int64))
    return replace(whole, train=train, test=test, findings=findings)


def load_test_conversations(data: str, source: SourceConfig) -> ConversationData:
    """Load the test rows of a task for a causal language model, for a server without training rows.

    Args:
        data: as for :func:`load_conversations`. Of a folder or a data set of the hub the test split
            is read, and of a single file all rows.
        source: as for :func:`load_conversations`; categories are not read.

    Returns:
        The task, whose ``train`` has no rows.

    Raises:
        DroppeftError: as :func:`load_conversations`.
    """
    if data == "builtin":
        check_builtin_source(source, None)
        builtin = load_builtin_docstrings()
        whole, shape = replace(builtin.test, keys=None), builtin.shape
        findings = Findings(rows_read=len(whole))
    else:
        tables, shape, _, findings = read_conversations([read_test_split(data, source)], source)
        [whole] = tables
    test = at_most(whole, source.max_test_rows)
    found = replace(findings, test_rows=len(test), beyond_limit=len(whole) - len(test))
    train = test.take(np.zeros(0, np.int64))
    return ConversationData(data, shape, train, test, (), found)


def read_conversations(
    splits: Sequence[Split],
    source: SourceConfig,
    label: str | None = None,
    key: str | None = None,
) -> tuple[list[ConversationTable], str, tuple[str, ...], Findings]:
    """Read conversations or documents of splits.

    Args:
        splits: the training split first.
        source: columns, and what to do about rows that lack a value.
        label: column of categories; ``None`` reads none.
        key: column with the owner of each training row.

    Returns:
        The rows of each split, the name of their shape, the names of the categories, and what was
        found.

    Raises:
        DroppeftError: no shape fits the columns, or a row cannot be used.
    """
    if source.prompt is None and source.text is None:
        splits = [_in_lower_case(split) for split in splits]
    train = splits[0]
    shape = _shape(train, source)
    categories = [
        read_labels(split, label, strip=source.strip_labels) if label else None for split in splits
    ]
    keys = owners(train, key) if key else None
    examples = [_examples(split, shape, source.missing) for split in splits]
    lacking = [
        _lacking(split, rows, category, label, keys if split is train else None, key)
        for split, rows, category in zip(splits, examples, categories, strict=True)
    ]
    kept, missing = kept_rows(lacking, source.missing)
    labels, names = _labels(categories, kept)
    tables = [
        ConversationTable(tuple(one for row in rows if (one := of_split[row])), values)
        for of_split, rows, values in zip(examples, kept, labels, strict=True)
    ]
    if keys is not None:
        tables[0] = replace(tables[0], keys=tuple(keys[row] for row in kept[0]))
    findings = Findings(
        remarks=tuple(dict.fromkeys(text for split in splits for text in split.remarks)),
        columns=_roles(shape, label, key),
        rows_read=sum(split.table.num_rows for split in splits),
        stripped_labels=sum(one.stripped for one in categories if one),
    )
    return tables, shape.name, names, dropped(findings, missing)


def _builtin(source: SourceConfig, key: str | None) -> ConversationData:
    check_builtin_source(source, key)
    data = load_builtin_docstrings()
    train = data.train if key else replace(data.train, keys=None)
    findings = Findings(rows_read=len(train) + len(data.test))
    return replace(data, train=train, test=replace(data.test, keys=None), findings=findings)


def _from_splits(data: str, source: SourceConfig, key: str | None) -> ConversationData:
    train, test = read_splits(data, source)
    splits = (train,) if test is None else (train, test)
    tables, shape, names, findings = read_conversations(splits, source, source.label, key)
    if test is None:
        tables = list(_split(tables[0], train.where))
        findings = replace(findings, remarks=(*findings.remarks, SPLIT_BY_US))
    return ConversationData(data, shape, tables[0], tables[1], names, findings)


def _roles(shape: Shape, label: str | None, key: str | None) -> dict[str, str]:
    """Which columns are read as what; those of a shape have its names."""
    more = {"category": label, "owner": key}
    return {
        **{name: name for name in shape.required},
        **{role: name for role, name in more.items() if name},
    }


def _lacking(
    split: Split,
    examples: Sequence[Example | None],
    category: LabelColumn | None,
    label: str | None,
    keys: Sequence[str] | None,
    key: str | None,
) -> Lacking:
    """Which rows lack what."""
    rows = {"text": ("the text is missing", np.array([one is None for one in examples]))}
    if category is not None:
        words, hidden = without_class({*category.values})
        none = words | hidden | {""}
        rows["label"] = (f"{label} is missing", np.array([one in none for one in category.values]))
    if keys is not None:
        rows["owner"] = (f"{key} is missing", np.array([not one for one in keys]))
    return Lacking(split, rows)


def _in_lower_case(split: Split) -> Split:
    """Rename columns such as ``Prompt`` if only then a shape fits."""
    names = split.table.column_names
    lower = [name.casefold() for name in names]
    shape = SHAPES.get(detect_shape(lower) or "")
    if detect_shape(names) is not None or shape is None or len({*lower}) < len(lower):
        return split
    read = {*shape.required, *shape.optional}
    renamed = [low if low in read else name for low, name in zip(lower, names, strict=True)]
    table = split.table.rename_columns(renamed)
    return Split(table, split.where, split.remarks, has_header=split.has_header)


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


def _examples(split: Split, shape: Shape, missing: Rule) -> tuple[Example | None, ...]:
    """Convert all rows; the first that cannot be used is named, and the others are counted.

    A row that lacks its text is ``None`` if such rows are to be dropped.
    """
    present = split.table.column_names
    for name in shape.required:
        if present.count(name) != 1:
            split.column(name, f"needed for the shape {shape.name}")
    names = [*shape.required, *(name for name in shape.optional if name in present)]
    examples: list[Example | None] = []
    bad, empty = [], 0
    for number, row in enumerate(split.table.select(names).to_pylist(), start=1):
        try:
            examples.append(_example(split, shape, row, number))
        except BadRow as reason:
            examples.append(None)
            empty += isinstance(reason, EmptyRow)
            if missing == "error" or not isinstance(reason, EmptyRow):
                bad.append(f"row {number}{split.numbering}: {reason}")
    if bad:
        others = f", and {len(bad) - 1:,} other rows cannot be used either" if bad[1:] else ""
        drop = ", or leave rows without a text out with source.missing=drop" if empty else ""
        raise DroppeftError(f"{split.where}, {bad[0]}{others}; correct or remove them{drop}")
    return tuple(examples)


def _example(split: Split, shape: Shape, row: Mapping[str, Any], number: int) -> Example:
    missing = next((name for name in shape.required if row[name] is None), None)
    if missing is None:
        return shape.convert(row)
    if other := _other_shape(split, number - 1):
        raise BadRow(f"{missing} is missing{other}")
    raise EmptyRow(f"{missing} is missing")


def _other_shape(split: Split, row: int) -> str:
    """Say so if a row has the columns of another shape."""
    [values] = split.table.slice(row, 1).to_pylist()
    other = detect_shape([name for name, value in values.items() if value is not None])
    if other is None:
        return ""
    return f" (the row has the shape {other}, and all rows of a file must have the same)"


def _labels(
    categories: Sequence[LabelColumn | None], kept: Sequence[Rows]
) -> tuple[list[Rows], tuple[str, ...]]:
    """Return the category of every row that is kept, for each split, and the names of all.

    Without a column of categories, all rows have the category 0, which has no name.
    """
    read = [one for one in categories if one is not None]
    if not read:
        return [np.zeros(len(rows), np.int64) for rows in kept], ()
    values = [[one.values[row] for row in rows] for one, rows in zip(read, kept, strict=True)]
    names = ordered((value for of_split in values for value in of_split), read[0].stored)
    index = indices_of((), names)
    return [np.array([index[value] for value in one], np.int64) for one in values], names


def _split(table: ConversationTable, where: str) -> tuple[ConversationTable, ConversationTable]:
    held_out = _test_rows(table)
    if not held_out.any():
        raise DroppeftError(f"{where} has too few rows for a test split; add rows or a test file")
    test = replace(table.take(np.flatnonzero(held_out)), keys=None)
    return table.take(np.flatnonzero(~held_out)), test


def _test_rows(table: ConversationTable) -> npt.NDArray[np.bool_]:
    """Select all rows of the fifth of each category's prompts that have the smallest hashes."""
    return with_smallest_hashes(hashes_of_prompts(table), table.labels)


def hashes_of_prompts(table: ConversationTable) -> list[str]:
    """Return a hash of the prompt of each conversation, and of the text of each document."""
    return [_hash_of_prompt(row) for row in table.rows]


def _hash_of_prompt(row: Example) -> str:
    content = row.text if isinstance(row, Document) else content_of(Conversation(prompt_of(row)))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
