"""The memory of a method's server state as plain JSON values, and back."""

import json
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from droppeft.errors import DroppeftError


def encode_memory(memory: Any) -> Any:
    """A frozen dataclass as dictionaries, lists, texts and numbers; keys become texts."""
    return TypeAdapter(type(memory)).dump_python(memory, mode="json")


def decode_memory(values: object, kind: type) -> Any:
    """The memory that :func:`encode_memory` made these values of; floats are equal bit for bit.

    Args:
        values: as they come from JSON.
        kind: class of the memory, a method's ``memory_type``.

    Raises:
        DroppeftError: they are not of this class, or not a memory at all.
    """
    wanted = [field.name for field in fields(kind)]
    if not isinstance(values, dict) or sorted(values) != sorted(wanted):
        found = sorted(values) if isinstance(values, dict) else values
        raise _foreign(f"it has {found}, and not {sorted(wanted)}")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _foreign(f"{place}: {first['msg'].lower()}") from None


def _foreign(why: str) -> DroppeftError:
    return DroppeftError(
        f"the server's memory is not what this method keeps ({why}); start the run anew"
    )
