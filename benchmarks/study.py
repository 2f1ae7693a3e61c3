"""Read and write the results of a study: `study.json`, and tables of rows beside it.

The folder `benchmarks/NAME` of a study holds its script and its results:

- `study.json`: schema version, command, package versions, machine, seeds, and single values;
- `TABLE.csv.gz`: rows, read by the names of their columns. `result` has what the pages show, a row
  per condition; other tables have what was measured, a row per repeat.

Scripts run from the repository's root, as `python -m benchmarks.NAME.run`.
"""

import csv
import gzip
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from droppeft.files import write_atomically
from droppeft.runs.environment import machine, versions

FOLDER = Path(__file__).resolve().parent
SCHEMA_VERSION = 1

Row = Mapping[str, Any]


def about(
    name: str, *, script: str = "run", accelerator: str = "cpu", data: Path | None = None
) -> dict[str, Any]:
    """What every `study.json` says about its origin.

    Args:
        script: the module in the folder of the study that was run.
        data: the folder that the command line names; `$DROPPEFT_DATA` stands in its place.
    """
    arguments = ["$DROPPEFT_DATA" if word == str(data) else word for word in sys.argv[1:]]
    return {
        "schema_version": SCHEMA_VERSION,
        "command": " ".join([f"python -m benchmarks.{name}.{script}", *arguments]),
        "versions": versions(),
        "machine": machine(accelerator),
    }


def write_values(name: str, content: Row) -> None:
    """Write single values to `study.json`."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(FOLDER / name / "study.json", text.encode())


def read_values(name: str) -> dict[str, Any]:
    """The single values of a study."""
    found = json.loads((FOLDER / name / "study.json").read_text(encoding="utf-8"))
    return dict(found)


def was_measured(name: str) -> bool:
    """Whether there is a result of this study."""
    return (FOLDER / name / "study.json").is_file()


def write_table(name: str, table: str, rows: Sequence[Row]) -> None:
    """Write rows of texts and numbers; a column that a row lacks is empty there."""
    columns = dict.fromkeys(column for row in rows for column in row)
    made = pa.table({column: [row.get(column) for row in rows] for column in columns})
    text = io.BytesIO()
    pyarrow.csv.write_csv(made, text)
    write_atomically(_file(name, table), gzip.compress(text.getvalue(), mtime=0))


def append_rows(name: str, table: str, rows: Sequence[Row]) -> None:
    """Append rows of the same columns in one write, because other processes may append theirs."""
    file, text = _file(name, table), io.StringIO()
    new = not file.exists()
    columns = list(rows[0] if new else read_table(name, table)[0])
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if new:
        writer.writeheader()
    writer.writerows(rows)
    with file.open("ab") as end:
        end.write(gzip.compress(text.getvalue().encode(), mtime=0))


def read_table(name: str, table: str = "result") -> list[dict[str, Any]]:
    """The rows of a table in their order; an empty field is `None`."""
    options = pyarrow.csv.ConvertOptions(
        strings_can_be_null=True, quoted_strings_can_be_null=False, null_values=[""]
    )
    found: list[dict[str, Any]] = pyarrow.csv.read_csv(
        _file(name, table), convert_options=options
    ).to_pylist()
    return found


def _file(name: str, table: str) -> Path:
    return FOLDER / name / f"{table}.csv.gz"
