"""Tables in JSON: a list of objects, or an object per line. Ours."""

import io
import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.json

from droppeft.table_files.unreadable import Unreadable

_CHANGED_TYPE = re.compile(r"Column\(/(.*)\) changed from (\w+) to (\w+) in row (\d+)")


def read_json(text: str) -> pa.Table:
    """Read a list of objects; many files hold a JSON object per line instead.

    Raises:
        Unreadable: it is not valid JSON, or its rows are not objects.
    """
    if not text.lstrip().startswith("["):
        return read_json_lines(text)
    try:
        rows = json.loads(text, parse_constant=lambda _: None)
    except ValueError as error:
        raise Unreadable(f"this is not valid JSON: {error}; correct it") from None
    if not rows:
        raise Unreadable("the list has no rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise Unreadable(f"row {number} is not an object with columns; correct it")
    return read_json_lines("".join(json.dumps(row) + "\n" for row in rows))


def read_json_lines(text: str) -> pa.Table:
    """Read an object per line; NaN is null, and a text that looks like a time stays text.

    Raises:
        Unreadable: a line is not a JSON object, or a column has values of several types.
    """
    if not text.strip():
        raise Unreadable("the file is empty")
    try:
        table = _table(text.encode())
    except pa.ArrowInvalid as error:
        if without := _without_nan(text):
            return read_json_lines(without)
        raise _reason(text, error) from None
    _check_rows(table)
    return table


def names_of(text: str, *, whole: bool) -> Sequence[str]:
    """Return the keys of the first object, of a list or of a line.

    Args:
        text: the beginning of a file.
        whole: whether it is the whole file.

    Raises:
        ValueError: there is no object.
        EOFError: the first object does not end within this text.
    """
    beginning = text.lstrip().removeprefix("[").lstrip()
    try:
        first, _ = json.JSONDecoder().raw_decode(beginning)
    except ValueError:
        if whole:
            raise
        raise EOFError from None
    return tuple(first) if isinstance(first, dict) else ()


def _table(content: bytes) -> pa.Table:
    # One block for the whole file: types are inferred from all rows.
    options = pa.json.ReadOptions(block_size=min(len(content) + 1, 2**31 - 1))
    table = pa.json.read_json(io.BytesIO(content), read_options=options)
    as_text = pa.schema([field.with_type(_without_times(field.type)) for field in table.schema])
    if as_text.equals(table.schema):
        return table
    parsing = pa.json.ParseOptions(explicit_schema=as_text)
    return pa.json.read_json(io.BytesIO(content), options, parsing)


def _without_times(kind: pa.DataType) -> pa.DataType:
    """Return the type with text in place of times, which are texts in JSON."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_times(field.type)) for field in kind])
    return kind


def _without_nan(text: str) -> str | None:
    """Return the lines with null for NaN, which JSON does not have but Python writes."""
    if "NaN" not in text:
        return None
    try:
        rows = [
            json.loads(line, parse_constant=lambda _: None)
            for line in text.split("\n")
            if line.strip()
        ]
    except ValueError:
        return None
    without = "".join(json.dumps(row) + "\n" for row in rows)
    return without if without.replace(" ", "") != text.replace(" ", "") else None


def _check_rows(table: pa.Table) -> None:
    """Refuse the columns of a table as objects of values, as pandas writes them by default."""
    kinds = [field.type for field in table.schema]
    if table.num_rows == 1 and all(
        pa.types.is_struct(kind) and all(field.name.isdecimal() for field in kind) for kind in kinds
    ):
        raise Unreadable(
            "the file holds an object for each column; write a list of rows, as pandas does with "
            "to_json(FILE, orient='records')"
        )


def _reason(text: str, error: pa.ArrowInvalid) -> Exception:
    if changed := _CHANGED_TYPE.search(str(error)):
        name, before, now, row = changed.groups()
        return Unreadable(
            f"row {int(row) + 1}: {name.replace('/', '.')} is of type {now}, and elsewhere "
            f"{before}; use one type"
        )
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and (wrong := _wrong_with(line)):
            return Unreadable(f"line {number} {wrong}; correct or remove it")
    return Unreadable(str(error).splitlines()[0])


def _wrong_with(line: str) -> str | None:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        return f"is not valid JSON ({error})"
    return None if isinstance(value, dict) else "is not a JSON object"
