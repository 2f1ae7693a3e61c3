"""Encode values of declared types as plain JSON, and decode them strictly.

pydantic, which reads our configuration, is not strict enough for messages from the network: it
ignores unknown fields of dataclasses, fills in missing ones, and accepts repeated keys. It also has
no encoding for arrays.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from droppeft.errors import DroppeftError
from droppeft.messages import Array

MOST_TEXT = 1_000
"""Largest number of characters of a string in a message."""


class Malformed(DroppeftError):
    """A message cannot be packed or read.

    The error repeats nothing from the message, which may be hostile.
    """


def one_line(text: str, most: int = MOST_TEXT) -> str:
    """Make a text from the network printable, and cut it to at most ``most`` characters."""
    line = "".join(char if char.isprintable() else " " for char in text[: most + 1])
    return line if len(line) <= most else line[: most - 1] + "…"


def encode(value: Any, arrays: dict[str, Array]) -> Any:
    """Encode a value as plain JSON.

    A mapping becomes an object if all its keys are strings, else a list of pairs. An array becomes
    a number, under which it is put into ``arrays``.
    """
    if isinstance(value, np.ndarray):
        arrays[str(len(arrays))] = _contiguous(value)
        return len(arrays) - 1
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: encode(getattr(value, name), arrays) for name in names}
    if isinstance(value, Mapping):
        pairs = [(key, encode(item, arrays)) for key, item in value.items()]
        return dict(pairs) if all(isinstance(key, str) for key in value) else pairs
    if isinstance(value, tuple | list):
        return [encode(item, arrays) for item in value]
    return sorted(value) if isinstance(value, frozenset) else value


def _contiguous(array: Array) -> Array:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"an array of type {array.dtype} has no encoding")
    return np.asarray(array, order="C")


@dataclass(frozen=True)
class Place:
    """A position in a message that is being decoded.

    Attributes:
        path: names of the fields that lead to it, for errors.
        arrays: the message's arrays that have not been used yet, by number.
    """

    path: str
    arrays: dict[str, Array]

    def at(self, step: object) -> "Place":
        """The position of a field or an item."""
        return Place(f"{self.path}.{step}", self.arrays)

    def wrong(self, tree: object, expected: str) -> Malformed:
        """The error for a value of the wrong type."""
        return Malformed(f"{self.path} of the message is {type(tree).__name__}, not {expected}")


def decode(kind: Any, tree: Any, place: Place) -> Any:
    """Decode a value of a declared type.

    Args:
        kind: the type: a dataclass, or one of :data:`_READERS`.
        tree: plain JSON.
        place: position of ``tree`` in the message.

    Raises:
        Malformed: the value is not of this type; the error names the place.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, tree, place)
    return _READERS[typing.get_origin(kind) or kind](typing.get_args(kind), tree, place)


_hints = functools.cache(typing.get_type_hints)


def _dataclass(kind: Any, tree: Any, place: Place) -> Any:
    hints = _hints(kind)
    if not isinstance(tree, dict):
        raise place.wrong(tree, "an object")
    if tree.keys() != hints.keys():
        missing = ", ".join(sorted(hints.keys() - tree.keys()))
        wrong = f"lacks {missing}" if missing else "has fields that are unknown here"
        raise Malformed(f"{place.path} of the message {wrong}; is droppeft the same on both sides?")
    return kind(**{name: decode(hints[name], tree[name], place.at(name)) for name in hints})


def _union(kinds: Sequence[Any], tree: Any, place: Place) -> Any:
    if tree is None and types.NoneType in kinds:
        return None
    rest = [kind for kind in kinds if kind is not types.NoneType]
    # An exact match of the type goes first, because an int is accepted as a float too.
    *others, last = sorted(rest, key=lambda kind: kind is not type(tree))
    for kind in others:
        try:
            return decode(kind, tree, place)
        except Malformed:
            continue
    return decode(last, tree, place)


def _mapping(kinds: Sequence[Any], tree: Any, place: Place) -> dict[Any, Any]:
    pairs = [list(pair) for pair in tree.items()] if isinstance(tree, dict) else tree
    if not isinstance(pairs, list):
        raise place.wrong(tree, "an object or a list of pairs")
    items = [_tuple(kinds, pair, place.at(index)) for index, pair in enumerate(pairs)]
    table = dict(items)
    _check_unrepeated(len(table), len(items), place)
    return table


def _set(kinds: Sequence[Any], tree: Any, place: Place) -> frozenset[Any]:
    items = _tuple((*kinds, ...), tree, place)
    values = frozenset(items)
    _check_unrepeated(len(values), len(items), place)
    return values


def _check_unrepeated(different: int, items: int, place: Place) -> None:
    if different != items:
        raise Malformed(f"{place.path} of the message has something twice")


def _tuple(kinds: Sequence[Any], tree: Any, place: Place) -> tuple[Any, ...]:
    if not isinstance(tree, list):
        raise place.wrong(tree, "a list")
    if Ellipsis in kinds:
        kinds = [kinds[0]] * len(tree)
    if len(kinds) != len(tree):
        raise Malformed(f"{place.path} of the message has {len(tree)} items, not {len(kinds)}")
    return tuple(
        decode(kind, item, place.at(index))
        for index, (kind, item) in enumerate(zip(kinds, tree, strict=True))
    )


def _array(_: Sequence[Any], tree: Any, place: Place) -> Array:
    if type(tree) is not int or str(tree) not in place.arrays:
        raise place.wrong(tree, "the number of an unused tensor")
    return place.arrays.pop(str(tree))


def _literal(allowed: Sequence[Any], tree: Any, place: Place) -> Any:
    if tree not in allowed:
        raise place.wrong(tree, f"one of {', '.join(map(str, allowed))}")
    return tree


def _string(_: Sequence[Any], tree: Any, place: Place) -> str:
    if not isinstance(tree, str):
        raise place.wrong(tree, "a string")
    if not tree.isprintable() or len(tree) > MOST_TEXT:
        raise Malformed(f"{place.path} of the message is too long or not printable")
    return tree


def _boolean(_: Sequence[Any], tree: Any, place: Place) -> bool:
    if not isinstance(tree, bool):
        raise place.wrong(tree, "true or false")
    return tree


def _integer(_: Sequence[Any], tree: Any, place: Place) -> int:
    if type(tree) is not int or not -(2**63) <= tree < 2**63:
        raise place.wrong(tree, "an integer of 64 bits")
    return tree


def _float(_: Sequence[Any], tree: Any, place: Place) -> float:
    return tree if isinstance(tree, float) else float(_integer((), tree, place))


def _anything(_: Sequence[Any], tree: Any, __: Place) -> Any:
    return tree


_READERS: dict[Any, Callable[[Sequence[Any], Any, Place], Any]] = {
    typing.Union: _union,
    types.UnionType: _union,
    Mapping: _mapping,
    tuple: _tuple,
    frozenset: _set,
    np.ndarray: _array,
    typing.Literal: _literal,
    str: _string,
    bool: _boolean,
    int: _integer,
    float: _float,
    Any: _anything,
}
"""Function that decodes a type, by the type or its generic origin."""
