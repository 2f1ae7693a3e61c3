"""Tables in delimited text, such as CSV, whose dialect is found. Ours."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from droppeft.table_files.unreadable import Unreadable

if TYPE_CHECKING:
    from _csv import Reader

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
SAMPLE_ROWS = 200
SAMPLE_CHARACTERS = 2**16

Records = list[list[str]]


@dataclass(frozen=True)
class Dialect:
    """How fields are separated and quoted.

    Attributes:
        delimiter: between two fields.
        quoted: whether a field may stand in double quotes; otherwise they are characters.
        escape: character before a quote within a quoted field; ``None`` if it is written twice.
        space: whether a space follows each delimiter.
    """

    delimiter: str
    quoted: bool = True
    escape: str | None = None
    space: bool = False

    def read(self, text: str, *, strict: bool) -> "Reader":
        """Return a reader of the records of a text."""
        csv.field_size_limit(2**31 - 1)  # one text may have more than the default of 128 kB
        return csv.reader(
            io.StringIO(text, newline=""),
            delimiter=self.delimiter,
            quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
            escapechar=self.escape,
            doublequote=self.escape is None,
            skipinitialspace=self.space,
            strict=strict,
        )


class _Wrong(Exception):
    """A line that does not fit a dialect; the message says why."""


def read_delimited(text: str, usual: str) -> tuple[list[str], Sequence[Sequence[str]], list[str]]:
    """Read a table whose first line has the names of the columns.

    If the quotes of a file do not match, quotes that are escaped by a backslash are tried, and then
    quotes as plain characters, which need that every line has all fields and that none is quoted.

    Args:
        text: the whole file.
        usual: the delimiter that files with this suffix have.

    Returns:
        The names, the columns, and remarks about what is unusual.

    Raises:
        Unreadable: a line has too few or too many fields, or a quote is not closed.
    """
    if "\0" in text:
        raise Unreadable("the file has characters of value 0, so it is not text")
    dialect = find_dialect(text, usual)
    remarks = []
    if dialect.delimiter != usual:
        remarks.append(f"fields are separated by {DELIMITERS[dialect.delimiter]}")
    try:
        records = _records(text, dialect)
    except _Wrong as wrong:
        dialect, records = _with_other_quotes(text, dialect, wrong)
        how = (
            "quotes within quotes are escaped by a backslash"
            if dialect.quoted
            else f"quotes are read as characters of the text, since {wrong}"
        )
        remarks.append(how)
    names, *rows = records
    columns: Sequence[Sequence[str]] = list(zip(*rows, strict=True)) or [()] * len(names)
    return [name.strip() for name in names], columns, remarks


def names_of(text: str, usual: str) -> list[str]:
    """Return the names of the columns from the beginning of a file."""
    reader: Iterator[list[str]] = find_dialect(text, usual).read(text, strict=False)
    header = next(reader, [])
    return [name.strip() for name in header]


def find_dialect(text: str, usual: str) -> Dialect:
    """Return the dialect by which most of the first rows have as many fields as the header.

    A delimiter that the header does not have is not considered.
    """
    best, found = (0.0, 0, False), Dialect(usual)
    sample = text
    if len(text) > SAMPLE_CHARACTERS:  # without the last line, which may not be whole
        sample = text[:SAMPLE_CHARACTERS].rpartition("\n")[0] or text
    for delimiter in DELIMITERS:
        dialect = Dialect(delimiter)
        try:
            records = [
                row for row in islice(dialect.read(sample, strict=False), SAMPLE_ROWS) if row
            ]
        except csv.Error:
            continue
        if not records or len(records[0]) < 2:
            continue
        fitting = sum(len(row) == len(records[0]) for row in records) / len(records)
        score = (fitting, len(records[0]), delimiter == usual)
        if score > best:
            space = all(name.startswith(" ") for name in records[0][1:])
            best, found = score, replace(dialect, space=space)
    return found


def _records(text: str, dialect: Dialect) -> Records:
    """Return all records, the header first; blank lines are left out."""
    reader = dialect.read(text, strict=True)
    try:
        lines = list(reader)
    except csv.Error:
        raise _stray_quote(text, dialect) from None
    records = [record for record in lines if record]
    if not records:
        raise Unreadable("the file is empty")
    if len(set(map(len, records))) > 1:
        raise _ragged(text, dialect)
    if reader.line_num > len(lines):
        _check_nothing_swallowed(text, dialect, records)
    return records


def _numbered(text: str, dialect: Dialect) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the first and last line of each record, from 1, and the record."""
    reader, start = dialect.read(text, strict=True), 1
    for record in reader:
        yield start, reader.line_num, record
        start = reader.line_num + 1


def _stray_quote(text: str, dialect: Dialect) -> _Wrong:
    start = 1
    try:
        for _, end, _ in _numbered(text, dialect):
            start = end + 1
    except csv.Error as error:
        if "unexpected end" in str(error):
            return _Wrong(f"line {start} opens a quote that is not closed")
    return _Wrong(f"the row in line {start} has a quote in the middle of a quoted field")


def _ragged(text: str, dialect: Dialect) -> _Wrong:
    numbered = ((first, record) for first, _, record in _numbered(text, dialect) if record)
    _, header = next(numbered)
    line, record = next((line, one) for line, one in numbered if len(one) != len(header))
    name, fields = DELIMITERS[dialect.delimiter], "field" if len(record) == 1 else "fields"
    return _Wrong(
        f"line {line} has {len(record)} {fields} and the first line {len(header)} (separated by "
        f"{name}); add what is missing"
        if len(record) < len(header)
        else f"line {line} has {len(record)} fields and the first line {len(header)} (separated by "
        f"{name}); put quotes around a field that has {name} itself"
    )


def _check_nothing_swallowed(text: str, dialect: Dialect, records: Records) -> None:
    """Refuse a field over several lines, each of which looks like a row of its own.

    That is so if each of the lines, quotes set aside, has all fields, and one of its fields has a
    value that the same column also has in rows of a single line.
    """
    fields = len(records[0])
    lines = _lines(text)
    rows = [row for row in islice(_numbered(text, dialect), 1, None) if row[2]]
    alone = [record for first, last, record in rows if last == first]
    known = [{record[column] for record in alone} for column in range(fields)]
    for first, last, _ in (row for row in rows if row[1] > row[0]):
        parts = [line.split(dialect.delimiter) for line in lines[first - 1 : last]]
        if all(len(part) == fields for part in parts) and any(
            all(part[column] in known[column] for part in parts) for column in range(fields)
        ):
            raise _Wrong(
                f"line {first} opens a quote that is closed in line {last}, and the lines between "
                "look like rows of their own"
            )


def _lines(text: str) -> list[str]:
    return [line.rstrip("\r\n") for line in io.StringIO(text, newline="")]


def _with_other_quotes(text: str, dialect: Dialect, wrong: _Wrong) -> tuple[Dialect, Records]:
    others = [replace(dialect, escape="\\")] if '\\"' in text else []
    if not _has_quoted_fields(text, dialect):
        others.append(replace(dialect, quoted=False))
    for other in others:
        try:
            return other, _records(text, other)
        except _Wrong:
            continue
    advice = "" if ";" in str(wrong) else "; close it, or write it twice if it is text"
    raise Unreadable(f"{wrong}{advice}")


def _has_quoted_fields(text: str, dialect: Dialect) -> bool:
    fields = (field for line in _lines(text) for field in line.split(dialect.delimiter))
    return any(len(field) > 1 and field[0] == field[-1] == '"' for field in fields)
