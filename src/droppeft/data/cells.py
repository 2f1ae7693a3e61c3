"""The values of a column as texts, spelled as in the file. Ours."""

from collections.abc import Sequence

import pyarrow as pa


class Unsuitable(Exception):
    """A column whose type has no spelling, such as a list; the message names the type."""


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts."""
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def spelled(column: pa.ChunkedArray) -> Sequence[str]:
    """Return the values of a column as texts, which are empty where a value is missing.

    Numbers and booleans are spelled as in Python, so that ``1.0`` remains ``1.0``, and true is
    ``True``. NaN is missing.

    Raises:
        Unsuitable: the values are neither texts, numbers nor booleans.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return spelled(column.cast(kind.value_type))
    if pa.types.is_null(kind):
        return [""] * len(column)
    if is_text(kind):
        return [value or "" for value in column.to_pylist()]
    if pa.types.is_floating(kind):
        if kind.bit_width < 64:
            column = column.cast(pa.float64())
        return [
            "" if value is None or value != value else repr(value) for value in column.to_pylist()
        ]
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind):
        return ["" if value is None else str(value) for value in column.to_pylist()]
    named = "list" if pa.types.is_nested(kind) and "list" in str(kind) else str(kind)
    raise Unsuitable(named if len(named) < 40 else f"{named[:37]}...")
