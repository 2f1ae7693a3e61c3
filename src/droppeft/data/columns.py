"""Find the columns of texts and labels in a table, by their names or by what they hold. Ours."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from droppeft.config import SourceConfig
from droppeft.data.cells import Unsuitable, spelled
from droppeft.data.labels import check_classes, ordered
from droppeft.data.splits import Split
from droppeft.errors import DroppeftError

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    *(
        (name,)
        for name in (
            *("text", "sentence", "content", "review", "tweet", "comment", "message", "body"),
            *("description", "question", "document", "utterance", "headline", "title", "post"),
            *("review_body", "review_text"),
        )
    ),
)
"""Names of a column of texts, or of two for pairs of texts; the first that exists is used."""

LABEL_COLUMNS = (
    *("label", "labels", "class", "category", "target", "stars", "sentiment", "intent", "rating"),
    *("topic", "emotion", "polarity", "genre", "tag"),
)
"""Names of a column of labels; the first that exists is used."""

INDEX_COLUMNS = ("", "unnamed: 0", "index", "id", "idx", "__index_level_0__")
"""Names of columns that number the rows and hold nothing else."""

LONGEST_CLASS = 50  # characters of a label, where a column is found by what it holds
GUESSED_ROWS = 2000


@dataclass(frozen=True)
class TextColumns:
    """The columns that a classification reads.

    Attributes:
        text: of the text, or of both texts of a pair.
        label: of the label.
        by_content: whether one of them was found by what it holds, and not by its name.
    """

    text: tuple[str, ...]
    label: str
    by_content: bool


class _Content(NamedTuple):
    """What a column holds: its values without missing ones."""

    name: str
    values: tuple[str, ...]

    @property
    def distinct(self) -> int:
        return len(set(self.values))

    @property
    def mean_length(self) -> float:
        return sum(map(len, self.values)) / max(1, len(self.values))

    @property
    def holds_classes(self) -> bool:
        """Whether at most every fifth value is new, and all are short."""
        most = max(2, len(self.values) // 5)
        return 2 <= self.distinct <= most and max(map(len, self.values)) <= LONGEST_CLASS

    @property
    def could_be_labels(self) -> bool:
        """Whether a run would not refuse the values as labels."""
        try:
            check_classes(ordered(self.values), len(self.values), "", self.name)
        except DroppeftError:
            return False
        return True

    @property
    def holds_texts(self) -> bool:
        """Whether most values are new, and they have several words."""
        several = sum(" " in value.strip() for value in self.values)
        return self.distinct > len(self.values) / 2 and several > len(self.values) / 2


def find_columns(split: Split, source: SourceConfig, in_node_file: bool = False) -> TextColumns:
    """Return the columns that are named by the settings, or else found.

    They are found by the names in ``TEXT_COLUMNS`` and ``LABEL_COLUMNS``, in any case. If that
    fails, and besides ``INDEX_COLUMNS`` there are only two, what they hold decides: the values of
    one must be classes, and those of the other texts.

    Args:
        split: the rows.
        source: the settings.
        in_node_file: whether the settings are those of a node file, which an error then names.

    Raises:
        DroppeftError: a column is not found; the message names the one that is most likely meant.
    """
    names = split.table.column_names
    text = source.text or next(
        (found for one in TEXT_COLUMNS if (found := named_columns(names, one))), None
    )
    [label] = (source.label,) if source.label is not None else _label(names) or (None,)
    if text is not None and label is not None:
        return TextColumns(tuple(text), label, by_content=False)
    return _by_content(split, text, label, in_node_file)


def _label(names: Sequence[str]) -> tuple[str, ...] | None:
    return next((found for one in LABEL_COLUMNS if (found := named_columns(names, (one,)))), None)


def named_columns(names: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...] | None:
    """Return the columns with these names; upper and lower case differ only if both exist."""
    folded = {name.strip().casefold(): name for name in reversed(names)}
    found = [name if name in names else folded.get(name.strip().casefold()) for name in wanted]
    return None if None in found else tuple(filter(None, found))


def _by_content(
    split: Split, text: Sequence[str] | None, label: str | None, in_node_file: bool
) -> TextColumns:
    names = split.table.column_names
    given = {*(text or ()), *filter(None, [label])}
    contents = [
        _content(split.table, name)
        for name in dict.fromkeys(names)
        if name not in given and name.strip().casefold() not in INDEX_COLUMNS
    ]
    only_two = len(contents) + len(given) == 2
    classes = [one for one in contents if label is None and one.holds_classes]
    texts = [one for one in contents if text is None and one.holds_texts]
    if only_two and len(classes) == (label is None) and len(texts) == (text is None):
        _check_header(split, [*classes, *texts])
        return TextColumns(
            tuple(text) if text else (texts[0].name,),
            label if label is not None else classes[0].name,
            by_content=True,
        )
    raise _not_found(split, contents, text, label, in_node_file)


def _content(table: pa.Table, name: str) -> _Content:
    column = table.select([table.column_names.index(name)])[0].slice(0, GUESSED_ROWS)
    try:
        return _Content(name, tuple(value for value in spelled(column) if value.strip()))
    except Unsuitable:
        return _Content(name, ())


def _check_header(split: Split, columns: Sequence[_Content]) -> None:
    """Refuse a table whose first row was taken for the names of its columns."""
    for column in columns:
        if column.name in map(str.strip, column.values):
            raise DroppeftError(
                f"{split.where}: the first line seems to be a row, since {column.name!r} is also a "
                "value below it; add a line with the names of the columns, such as text,label"
            )


def _not_found(
    split: Split,
    contents: Sequence[_Content],
    text: Sequence[str] | None,
    label: str | None,
    in_node_file: bool,
) -> DroppeftError:
    """The error, with the columns that are likely meant: longest texts, fewest labels.

    Raises:
        DroppeftError: the first line has no names of columns.
    """
    _check_header(split, contents)
    filled = [one for one in contents if one.values]
    likely: dict[str, str] = {}
    if text is None and filled:
        longest = max(filled, key=lambda one: one.mean_length)
        filled.remove(longest)
        likely["text"] = longest.name
    several = [one for one in filled if one.could_be_labels]
    if label is None and several:
        likely["label"] = min(several, key=lambda one: one.distinct).name
    missing = [name for name, found in (("text", text), ("label", label)) if found is None]
    advice = (_in_node_file if in_node_file else _in_settings)(missing, likely)
    return DroppeftError(
        f"{split.where}: no {' and no '.join(missing)} column found among "
        f"{', '.join(split.table.column_names)}; {advice}"
    )


def _in_settings(missing: Sequence[str], likely: Mapping[str, str]) -> str:
    advice = (
        f"add {' '.join(f'source.{key}={shlex.quote(likely[key])}' for key in missing)} "
        "if that is meant"
        if len(likely) == len(missing)
        else f"name {_them(missing)} with {' and '.join(f'source.{key}' for key in missing)}"
    )
    return f"{advice}, or task=causal_lm to learn to write texts"


def _in_node_file(missing: Sequence[str], likely: Mapping[str, str]) -> str:
    if len(likely) < len(missing):
        return f"name {_them(missing)} with {' and '.join(missing)} in [source] of the node file"
    lines = " and ".join(
        f"{key} = {json.dumps(likely[key], ensure_ascii=False)}" for key in missing
    )
    return f"write {lines} in [source] of the node file if that is meant"


def _them(missing: Sequence[str]) -> str:
    return "it" if len(missing) == 1 else "them"
