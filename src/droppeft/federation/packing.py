"""Plans and Replies as JSON text and one safetensors blob, and back; nothing is ever unpickled.

The text follows the fields and types of the dataclasses themselves: a message that gains a field
needs no line here. What comes in is taken for hostile until every value has its declared type.
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from droppeft.errors import DroppeftError
from droppeft.plans import Array, Failure, Plan, Reply, Update

MOST_HEAD = 1_000_000
"""Characters of the longest head."""

MOST_TEXT = 1_000
"""Characters of the longest name or sentence in a head."""


class Malformed(DroppeftError):
    """A message that cannot be packed or read; it repeats nothing that the message says."""


@dataclass(frozen=True)
class Packed:
    """A message as it travels.

    Attributes:
        head: JSON text of everything but the arrays, which it calls by number.
        tensors: the arrays, a safetensors blob with numbers for names.
    """

    head: str
    tensors: bytes


@dataclass(frozen=True)
class Errand:
    """What a device is told besides its Plan, so that it needs no configuration of its own.

    Attributes:
        config: the run's resolved configuration, the tree of ``config.as_tree``.
        identity: hashes of the texts, split and backbone that the device must find.
        resident: whether a process beside the device may keep the model for the next message.
    """

    config: Mapping[str, Any]
    identity: Mapping[str, str]
    resident: bool


@dataclass(frozen=True)
class _Task:
    plan: Plan
    errand: Errand


def pack_plan(plan: Plan, errand: Errand) -> Packed:
    """Pack what a device is sent; equal content in equal order gives equal bytes.

    Raises:
        Malformed: it holds what cannot travel, or its text is too long.
    """
    return _pack("task", _Task(plan, errand))


def unpack_plan(packed: Packed) -> tuple[Plan, Errand]:
    """Read what :func:`pack_plan` made.

    Raises:
        Malformed: it is anything else.
    """
    task: _Task = _unpack(packed, {"task": _Task})
    return task.plan, task.errand


def pack_reply(reply: Reply) -> Packed:
    """Pack what a device answers; the reason of a Failure is made one line.

    Raises:
        Malformed: it holds what cannot travel, or its text is too long.
    """
    if isinstance(reply, Failure):
        return _pack("failure", dataclasses.replace(reply, reason=one_line(reply.reason)))
    return _pack("update", reply)


def unpack_reply(packed: Packed, most_bytes: int) -> Reply:
    """Read what :func:`pack_reply` made. Its numbers are not judged here: they may be NaN.

    Args:
        packed: what came.
        most_bytes: of the blob, which is refused unread beyond that. It has the arrays' bytes, at
            most 200 more for each array of up to four dimensions, and 16.

    Raises:
        Malformed: it is anything else, or larger.
    """
    if len(packed.tensors) > most_bytes:
        raise Malformed(
            f"the message has {len(packed.tensors)} bytes of tensors, {most_bytes} at most are due"
        )
    reply: Reply = _unpack(packed, {"update": Update, "failure": Failure})
    return reply


def one_line(text: str, most: int = MOST_TEXT) -> str:
    """Make a text from elsewhere fit for a screen: printable, and at most so many characters."""
    line = "".join(sign if sign.isprintable() else " " for sign in text[: most + 1])
    return line if len(line) <= most else line[: most - 1] + "…"


def _pack(kind: str, message: object) -> Packed:
    arrays: dict[str, Array] = {}
    try:
        head = json.dumps({kind: _encode(message, arrays)}, separators=(",", ":"))
        blob: bytes = safetensors.numpy.save(arrays)
    except (TypeError, SafetensorError) as error:
        raise Malformed(f"the {kind} cannot be packed: {error}") from None
    _check_length(head)
    return Packed(head, blob)


def _unpack(packed: Packed, kinds: Mapping[str, type]) -> Any:
    head = _parse(packed.head)
    if len(head) != 1 or not head.keys() <= kinds.keys():
        raise Malformed(f"the message is no {' and no '.join(kinds)}")
    [(kind, tree)] = head.items()
    place = _Place(kind, _load(packed.tensors))
    message = _decode(kinds[kind], tree, place)
    if place.arrays:
        raise Malformed(f"the message has {len(place.arrays)} tensors that it does not speak of")
    return message


def _check_length(head: str) -> None:
    if len(head) > MOST_HEAD:
        raise Malformed(
            f"the message has {len(head)} characters of text, {MOST_HEAD} at most may travel"
        )


def _parse(head: str) -> dict[str, Any]:
    _check_length(head)
    try:
        tree = json.loads(head, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        raise Malformed("the message's text is not JSON, or names something twice") from None
    if not isinstance(tree, dict):
        raise Malformed("the message's text is not a JSON object")
    return tree


def _without_repeats(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _load(blob: bytes) -> dict[str, Array]:
    try:
        arrays: dict[str, Array] = safetensors.numpy.load(blob)
    except KeyError as error:
        raise Malformed(f"the message has tensors of a type unknown to numpy: {error}") from None
    except (SafetensorError, ValueError):
        raise Malformed("the message's tensors are not a whole safetensors blob") from None
    return arrays


def _encode(value: Any, arrays: dict[str, Array]) -> Any:
    """Turn a value into plain JSON; its arrays become numbers and are put into ``arrays``.

    A mapping becomes an object if all its keys are texts, else a list of pairs.
    """
    if isinstance(value, np.ndarray):
        arrays[str(len(arrays))] = _dense(value)
        return len(arrays) - 1
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _encode(getattr(value, name), arrays) for name in names}
    if isinstance(value, Mapping):
        pairs = [(key, _encode(item, arrays)) for key, item in value.items()]
        return dict(pairs) if all(isinstance(key, str) for key in value) else pairs
    if isinstance(value, tuple | list):
        return [_encode(item, arrays) for item in value]
    return sorted(value) if isinstance(value, frozenset) else value


def _dense(array: Array) -> Array:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"there is no place for an array of type {array.dtype}")
    return np.asarray(array, order="C")


@dataclass(frozen=True)
class _Place:
    """Where in a message its reader stands, and the arrays not spoken of until there."""

    path: str
    arrays: dict[str, Array]

    def at(self, step: object) -> "_Place":
        return _Place(f"{self.path}.{step}", self.arrays)

    def wrong(self, tree: object, expected: str) -> Malformed:
        return Malformed(f"{self.path} of the message is {type(tree).__name__}, not {expected}")


def _decode(kind: Any, tree: Any, place: _Place) -> Any:
    """Read a value of the declared type from plain JSON, or say where it is not one."""
    if dataclasses.is_dataclass(kind):
        return _record(kind, tree, place)
    return _READERS[typing.get_origin(kind) or kind](typing.get_args(kind), tree, place)


_hints = functools.cache(typing.get_type_hints)


def _record(kind: Any, tree: Any, place: _Place) -> Any:
    hints = _hints(kind)
    if not isinstance(tree, dict):
        raise place.wrong(tree, "an object")
    if tree.keys() != hints.keys():
        missing = ", ".join(sorted(hints.keys() - tree.keys()))
        wrong = f"lacks {missing}" if missing else "has fields that are unknown here"
        raise Malformed(f"{place.path} of the message {wrong}; is droppeft the same on both sides?")
    return kind(**{name: _decode(hints[name], tree[name], place.at(name)) for name in hints})


def _choice(kinds: Sequence[Any], tree: Any, place: _Place) -> Any:
    if tree is None and types.NoneType in kinds:
        return None
    rest = [kind for kind in kinds if kind is not types.NoneType]
    *others, last = sorted(rest, key=lambda kind: kind is not type(tree))
    for kind in others:
        try:
            return _decode(kind, tree, place)
        except Malformed:
            continue
    return _decode(last, tree, place)


def _mapping(kinds: Sequence[Any], tree: Any, place: _Place) -> dict[Any, Any]:
    pairs = [list(pair) for pair in tree.items()] if isinstance(tree, dict) else tree
    if not isinstance(pairs, list):
        raise place.wrong(tree, "an object or a list of pairs")
    items = [_tuple(kinds, pair, place.at(index)) for index, pair in enumerate(pairs)]
    table = dict(items)
    _check_unrepeated(len(table), len(items), place)
    return table


def _set(kinds: Sequence[Any], tree: Any, place: _Place) -> frozenset[Any]:
    items = _tuple((*kinds, ...), tree, place)
    found = frozenset(items)
    _check_unrepeated(len(found), len(items), place)
    return found


def _check_unrepeated(different: int, items: int, place: _Place) -> None:
    if different != items:
        raise Malformed(f"{place.path} of the message names something twice")


def _tuple(kinds: Sequence[Any], tree: Any, place: _Place) -> tuple[Any, ...]:
    if not isinstance(tree, list):
        raise place.wrong(tree, "a list")
    if Ellipsis in kinds:
        kinds = [kinds[0]] * len(tree)
    if len(kinds) != len(tree):
        raise Malformed(f"{place.path} of the message has {len(tree)} items, not {len(kinds)}")
    return tuple(
        _decode(kind, item, place.at(index))
        for index, (kind, item) in enumerate(zip(kinds, tree, strict=True))
    )


def _array(_: Sequence[Any], tree: Any, place: _Place) -> Array:
    if type(tree) is not int or str(tree) not in place.arrays:
        raise place.wrong(tree, "the number of a tensor of its own")
    return place.arrays.pop(str(tree))


def _literal(allowed: Sequence[Any], tree: Any, place: _Place) -> Any:
    if tree not in allowed:
        raise place.wrong(tree, f"one of {', '.join(map(str, allowed))}")
    return tree


def _text(_: Sequence[Any], tree: Any, place: _Place) -> str:
    if not isinstance(tree, str):
        raise place.wrong(tree, "a text")
    if not tree.isprintable() or len(tree) > MOST_TEXT:
        raise Malformed(f"{place.path} of the message is too long or not printable")
    return tree


def _flag(_: Sequence[Any], tree: Any, place: _Place) -> bool:
    if not isinstance(tree, bool):
        raise place.wrong(tree, "true or false")
    return tree


def _whole(_: Sequence[Any], tree: Any, place: _Place) -> int:
    if type(tree) is not int or not -(2**63) <= tree < 2**63:
        raise place.wrong(tree, "an integer of 64 bits")
    return tree


def _real(_: Sequence[Any], tree: Any, place: _Place) -> float:
    return tree if isinstance(tree, float) else float(_whole((), tree, place))


def _anything(_: Sequence[Any], tree: Any, __: _Place) -> Any:
    return tree


_READERS: dict[Any, Callable[[Sequence[Any], Any, _Place], Any]] = {
    typing.Union: _choice,
    types.UnionType: _choice,
    Mapping: _mapping,
    tuple: _tuple,
    frozenset: _set,
    np.ndarray: _array,
    typing.Literal: _literal,
    str: _text,
    bool: _flag,
    int: _whole,
    float: _real,
    Any: _anything,
}
"""How a type is read, by the type or by what it is a case of."""
