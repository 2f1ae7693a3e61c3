"""From the values of a label column to classes. Ours.

Labels are compared as they are spelled. What they mean is decided for all splits together: classes
that are numbers are in the order of the numbers, and -1 beside other numbers is no class.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from droppeft.data.cells import Unsuitable, spelled
from droppeft.data.splits import Split
from droppeft.errors import DroppeftError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)

MISSING_WORDS = frozenset({"na", "n/a", "<na>", "nan", "null", "none"})
"""Words that mean a missing label, in any case, where all other labels are numbers."""

MANY_NUMBERS = 20
"""More different numbers than this may be a quantity and no classes."""

HIDDEN = -1.0
"""The label of rows whose class is kept secret, as in the test splits of GLUE."""

_BETWEEN_WORDS = re.compile(r"[\s_\-.,;:'\"!?()/&]+")


@dataclass(frozen=True)
class LabelColumn:
    """The labels of a split.

    Attributes:
        values: of each row; empty where it is missing.
        stripped: number of labels that had spaces around them, which were removed.
        stored: names that the file has for the numbers 0, 1, …; empty if it has none.
    """

    values: tuple[str, ...]
    stripped: int
    stored: tuple[str, ...]


def read_labels(split: Split, name: str, *, strip: bool) -> LabelColumn:
    """Return the labels in column ``name``, spelled as in the file.

    Numbers for which the file has names, as those of the datasets library, are replaced by them.

    Raises:
        DroppeftError: there is no such column, or its values have no spelling.
    """
    column = split.column(name, "source.label")
    try:
        values = spelled(column)
    except Unsuitable as kind:
        raise DroppeftError(
            f"{split.where}: {name} has type {kind}; labels must be text, whole numbers or "
            "booleans; neither regression nor several labels of a row can be learnt"
        ) from None
    stored = _stored_names(split.table.schema, name) if pa.types.is_integer(column.type) else ()
    if not strip:
        return LabelColumn(tuple(_with_names(values, stored)), 0, stored)
    bare = tuple(value.strip() for value in values)
    stripped = sum(len(one) < len(other) for one, other in zip(bare, values, strict=True) if one)
    stored = tuple(one.strip() for one in stored)
    return LabelColumn(tuple(_with_names(bare, stored)), stripped, stored)


def _with_names(values: Sequence[str], stored: Sequence[str]) -> Sequence[str]:
    """Return the stored names of labels that are their places; hidden labels remain."""
    names = {str(place): name for place, name in enumerate(stored)}
    fits = {*values} <= names.keys() | {"", "-1"}
    return [names.get(value, value) for value in values] if fits else values


def _stored_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    try:
        stored = json.loads((schema.metadata or {})[b"huggingface"])
        names = tuple(map(str, stored["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
    return names if len({*names}) == len(names) else ()


def number(value: str) -> float | None:
    """Return the number that a label is, or ``None``."""
    return float(value) if _NUMBER.fullmatch(value) else None


def without_class(values: Collection[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the labels that stand for no class: words for missing ones, and hidden ones.

    Args:
        values: all labels of all splits.
    """
    present = {value for value in values if value}
    words = {value for value in present if value.casefold() in MISSING_WORDS}
    numbers = {value: number(value) for value in present - words}
    if not numbers or None in numbers.values():
        words = set()
    hidden = {value for value, found in numbers.items() if found == HIDDEN}
    if {found for value, found in numbers.items()} == {-1.0, 1.0}:
        hidden = set()
    return frozenset(words), frozenset(hidden)


def ordered(values: Iterable[str], stored: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the classes in order: of the stored names, of the numbers, or of the letters."""
    present = {*values}
    if present <= {*stored}:
        return tuple(name for name in stored if name in present)
    numbers = {value: number(value) for value in present}
    if all(found is not None for found in numbers.values()):
        return tuple(sorted(present, key=lambda value: (numbers[value] or 0.0, value)))
    return tuple(sorted(present))


def check_classes(classes: Sequence[str], rows: int, where: str, label: str) -> None:
    """Refuse labels that are no classes.

    Raises:
        DroppeftError: there is only one class, more than half as many as rows, or they are numbers
            that are not whole.
    """
    if len(classes) < 2:
        raise DroppeftError(f"{where}: {label} has only one value, {classes[0]}; use two or more")
    numbers = [number(name) for name in classes]
    if None not in numbers:
        odd = [name for name, found in zip(classes, numbers, strict=True) if found and found % 1]
        if odd:
            advice = f"; if they are classes, write them as text, such as 'class {odd[0]}'"
            raise DroppeftError(
                f"{where}: {label} has numbers that are not whole, such as {odd[0]}; regression is "
                f"not supported{advice if len(classes) <= MANY_NUMBERS else ''}"
            )
    if len(classes) > max(2, rows / 2):
        raise DroppeftError(
            f"{where}: {label} has {len(classes):,} different values in {rows:,} rows, so it seems "
            "to be an id or a number to predict, which is not supported; name the column of the "
            "classes with source.label"
        )


def indices_of(
    values: Iterable[str], classes: Sequence[str], stored: Sequence[str] = ()
) -> dict[str, int]:
    """Return the class of each label that has one.

    A label of another spelling has one if it is the same number as a class (``1.0`` and ``1``), or
    the place of a class in the stored names.
    """
    index = {name: place for place, name in enumerate(classes)}
    by_number: dict[float, list[int]] = defaultdict(list)
    for name, place in index.items():
        if (found := number(name)) is not None:
            by_number[found].append(place)
    for place, name in enumerate(stored):
        if name in index and not by_number.get(float(place)):
            by_number[float(place)] = [index[name]]
    unseen = {value for value in values if value not in index}
    for value in unseen:
        same = by_number.get(found, []) if (found := number(value)) is not None else []
        if len(same) == 1:
            index[value] = same[0]
    return index


def similar_names(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Return groups of names that differ only in case, spaces or punctuation.

    Numbers are similar if they are equal: 1 and 1.0, but not 1 and -1.
    """
    groups: Mapping[object, list[str]] = defaultdict(list)
    for name in names:
        groups[key_of_name(name)].append(name)
    return tuple(tuple(group) for key, group in groups.items() if key and len(group) > 1)


def key_of_name(name: str) -> object:
    """Return what names that are nearly the same have in common; empty if nothing is left."""
    found = number(name)
    if found is not None:
        return (found,)
    return _BETWEEN_WORDS.sub("", unicodedata.normalize("NFKC", name).casefold())
