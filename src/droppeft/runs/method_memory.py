"""The memory of a method's server state as plain JSON values, and back."""

import json
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from droppeft.errors import DroppeftError


def encode_memory(memory: Any) -> Any:
    """Convert a frozen dataclass to plain JSON values; keys become strings."""
    kind: type = type(memory)
    return _adapter_of(kind).dump_python(memory, mode="json")


def decode_memory(values: object, kind: type) -> Any:
    """Convert the values of :func:`encode_memory` back; floats are equal bit for bit.

    Args:
        values: as read from JSON.
        kind: class of the memory, a method's ``memory_type``.

    Raises:
        DroppeftError: the values are not a memory of this class.
    """
    expected = sorted(field.name for field in fields(kind))
    if not isinstance(values, dict) or sorted(values) != expected:
        names = sorted(values) if isinstance(values, dict) else values
        raise _mismatch(f"it has {names}, and not {expected}")
    try:
        return _adapter_of(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _mismatch(f"{place}: {first['msg'].lower()}") from None


@cache
def _adapter_of(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _mismatch(why: str) -> DroppeftError:
    return DroppeftError(f"the server's memory is not that of this method ({why}); start a new run")
