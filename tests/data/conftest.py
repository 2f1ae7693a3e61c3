"""Fixtures for small data sets in files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

Columns = Mapping[str, Sequence[Any]]


def _write_json_lines(table: pa.Table, path: Path) -> None:
    import json

    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    ".parquet": pyarrow.parquet.write_table,
    ".csv": pyarrow.csv.write_csv,
    ".jsonl": _write_json_lines,
}


@pytest.fixture
def write() -> Callable[[Path, Columns], Path]:
    """Function ``write(path, columns)`` that writes a file in the format of its suffix."""

    def to_file(path: Path, columns: Columns) -> Path:
        WRITERS[path.suffix](pa.table(dict(columns)), path)
        return path

    return to_file
