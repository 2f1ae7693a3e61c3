"""Every setting with its type, its defaults and its meaning, as text for readers. Ours."""

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import annotated_types
from pydantic.fields import FieldInfo

from droppeft.config.defaults import (
    BUILTIN_DEFAULTS,
    DEFAULTS_OF_METHOD_AND_TASK,
    METHOD_DEFAULTS,
    TASK_DEFAULTS,
)
from droppeft.config.reading import build_config, flat, known_keys
from droppeft.config.schema import Config
from droppeft.config.table import Table

_TYPES: dict[object, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
}
_BOUNDS = {
    annotated_types.Ge: ("≥", "ge"),
    annotated_types.Gt: (">", "gt"),
    annotated_types.Le: ("≤", "le"),
    annotated_types.Lt: ("<", "lt"),
}


@dataclass(frozen=True)
class Setting:
    """A setting for readers.

    Attributes:
        key: with its table, as ``dropout.mean``.
        type: with its bounds, as ``number > 0``; values to choose from are between backticks.
        default: of a method that has no defaults of its own; ``None`` if there is none.
        other_defaults: by method or task, as ``method=adaptive``.
        meaning: its description.
    """

    key: str
    type: str
    default: str | None
    other_defaults: Mapping[str, str]
    meaning: str


def all_settings() -> list[Setting]:
    """Every setting, in the order of the tables."""
    others = {
        who: flat(tables)
        for who, tables in (
            *((f"method={name}", tables) for name, tables in METHOD_DEFAULTS.items()),
            *(
                (f"method={method} task={task}", tables)
                for (method, task), tables in DEFAULTS_OF_METHOD_AND_TASK.items()
            ),
            *((f"task={name}", tables) for name, tables in TASK_DEFAULTS.items()),
            *((f"task={name} data=builtin", one) for name, one in BUILTIN_DEFAULTS.items()),
        )
    }
    return [
        Setting(
            key,
            _type(field),
            _default(key),
            {who: plain(values[key]) for who, values in others.items() if key in values},
            field.description or "",
        )
        for key, field in known_keys()
    ]


def settings_of(table: type[Table]) -> list[Setting]:
    """Every setting of a file that is not the configuration of a run, such as a node file."""
    return [
        Setting(key, _type(field), _own_default(field), {}, field.description or "")
        for key, field in known_keys(table)
    ]


def _own_default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    return None if value is None or value == {} else _number_or_text(value)


def plain(value: object) -> str:
    """A default as it is written in a file."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(plain, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {_number(getattr(bound, name))}"
        for bound in field.metadata
        for kind, (sign, name) in _BOUNDS.items()
        if isinstance(bound, kind)
    ]
    return " ".join([_kind(field.annotation), ", ".join(bounds)]).strip()


def _kind(annotation: object) -> str:
    """Name a type for readers; that a setting may be absent shows in its default."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(kind) for kind in arguments if kind is not type(None))
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        kind = _kind(arguments[0])
        return f"list of {kind.replace('list', 'lists') if 'list' in kind else f'{kind}s'}"
    if origin is dict:
        return "table"
    return _TYPES[annotation]


def _default(key: str) -> str | None:
    value: Any = Config() if key == "method" else build_config({"method": "droppeft"})
    for name in key.split("."):
        value = getattr(value, name)
    return None if value is None else _number_or_text(value)


def _number_or_text(value: object) -> str:
    return _number(value) if isinstance(value, float) else plain(value)


def _number(value: float) -> str:
    """Four digits, or a power of two where a bound is one."""
    if isinstance(value, int) and value > 10**6 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:.4g}"
