"""Which file is read how, by its suffix. Ours."""

import gzip
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from droppeft.errors import DroppeftError
from droppeft.git_lfs import check_no_pointer
from droppeft.table_files.delimited import names_of, read_delimited
from droppeft.table_files.json_rows import names_of as json_names_of
from droppeft.table_files.json_rows import read_json, read_json_lines
from droppeft.table_files.text_encoding import decode
from droppeft.table_files.unreadable import Unreadable

GZIP = ".gz"
HEAD_BYTES = 2**16
MOST_HEAD_BYTES = 2**24

UNREADABLE = (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError)
"""Errors of a file that is not what its suffix says."""


@dataclass(frozen=True)
class TableFile:
    """The content of a file.

    Attributes:
        table: its rows.
        remarks: what is unusual about how they were read, as parts of sentences.
        has_header: whether a line with the names of the columns precedes the rows.
    """

    table: pa.Table
    remarks: tuple[str, ...] = ()
    has_header: bool = False


def format_of(path: Path) -> str | None:
    """Return the suffix that decides how a file is read, in lower case and without ``.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] == GZIP and suffixes[-2] in TEXT_FORMATS:
        return suffixes[-2]
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def is_table_file(path: Path) -> bool:
    """Whether a file has a suffix that can be read, and is not hidden."""
    return format_of(path) is not None and not path.name.startswith(".")


def stem_of(path: Path) -> str:
    """Return the name of a file without the suffixes that say its format."""
    compressed = path.suffix.lower() == GZIP
    return Path(path.stem).stem if compressed else path.stem


def read_table(path: Path) -> TableFile:
    """Read all rows of a file.

    Raises:
        DroppeftError: the suffix is unknown, or the file is a Git LFS pointer, or it cannot be read
            as what it says.
    """
    kind = format_of(path)
    if kind is None:
        if path.suffix.lower() in SPREADSHEETS:
            raise DroppeftError(f"{path} is a spreadsheet; save it as CSV")
        hint = "; if it is a table, rename it to .csv or .tsv" if path.suffix == ".txt" else ""
        raise DroppeftError(
            f"{path} is not one of {', '.join(TEXT_FORMATS)} (each also with .gz), "
            f"{', '.join(BINARY_FORMATS)}{hint}"
        )
    check_no_pointer(path)
    try:
        return _read_text(path, kind) if kind in TEXT_FORMATS else BINARY_FORMATS[kind](path)
    except Unreadable as error:
        raise DroppeftError(f"{path}: {error}") from None
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DroppeftError(f"{path} cannot be read as {kind[1:]}: {reason}") from None


def columns_of(path: Path) -> Sequence[str]:
    """Return the names of the columns from the beginning of a file.

    Those of a JSON file are the keys of its first object. The sequence is empty if they cannot be
    read, and reading the file says why.
    """
    kind = format_of(path)
    try:
        if kind is None:
            return ()
        if kind in TEXT_FORMATS:
            return _text_columns(path, kind)
        names: Sequence[str] = _schema_of(path, kind).names
    except (*UNREADABLE, ValueError):
        return ()
    return names


# Text


def _bytes_of(path: Path, most: int = -1) -> bytes:
    """Return the first bytes of a file, or all of them, decompressed."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        if path.suffix.lower() == GZIP:
            return stack.enter_context(gzip.GzipFile(fileobj=file)).read(most)
        return file.read(most)


def _read_text(path: Path, kind: str) -> TableFile:
    text, remark = decode(_bytes_of(path))
    remarks = [remark] if remark else []
    if kind in DELIMITED:
        names, columns, more = read_delimited(text, DELIMITED[kind])
        arrays = [pa.chunked_array([pa.array(column, pa.large_string())]) for column in columns]
        return TableFile(pa.Table.from_arrays(arrays, names), (*remarks, *more), has_header=True)
    return TableFile(JSON[kind](text), tuple(remarks))


def _text_columns(path: Path, kind: str) -> Sequence[str]:
    size = HEAD_BYTES
    while True:
        head = _bytes_of(path, size)
        whole = len(head) < size
        text, _ = decode(head, whole=whole)
        if kind in DELIMITED:
            return names_of(text, DELIMITED[kind])
        try:
            return json_names_of(text, whole=whole)
        except EOFError:
            if size >= MOST_HEAD_BYTES:
                raise
            size *= 16


# Parquet and Arrow


def _read_parquet(path: Path) -> TableFile:
    # pyarrow.parquet.read_table would add columns for folder names such as "fold=3".
    with pa.parquet.ParquetFile(path) as file:
        return TableFile(file.read())


def _read_arrow(path: Path) -> TableFile:
    with pa.OSFile(str(path)) as source, _arrow_reader(source) as reader:
        return TableFile(reader.read_all())


def _schema_of(path: Path, kind: str) -> pa.Schema:
    if kind == ".parquet":
        return pa.parquet.read_schema(path)
    with pa.OSFile(str(path)) as source, _arrow_reader(source) as reader:
        return reader.schema


def _arrow_reader(source: pa.NativeFile) -> pa.ipc.RecordBatchFileReader:
    """Open an Arrow file, or a stream, as the library datasets writes."""
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


DELIMITED = {".csv": ",", ".tsv": "\t"}
"""The usual delimiter, by suffix."""

JSON: dict[str, Callable[[str], pa.Table]] = {".jsonl": read_json_lines, ".json": read_json}

TEXT_FORMATS = (*DELIMITED, *JSON)

BINARY_FORMATS: dict[str, Callable[[Path], TableFile]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}

SPREADSHEETS = (".xlsx", ".xls", ".ods")
"""Suffixes of files that programs for spreadsheets save, and that are not read."""

SUFFIXES = (*TEXT_FORMATS, *BINARY_FORMATS)
