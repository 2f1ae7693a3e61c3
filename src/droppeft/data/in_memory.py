"""Write data in memory to files that a run reads, now and when it is resumed. Ours."""

import hashlib
import io
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from droppeft.config import SourceConfig
from droppeft.data.splits import TEST_SPLITS, read_file
from droppeft.errors import DroppeftError
from droppeft.files import write_atomically
from droppeft.quantities import counted

OWNER = "client"
"""The column that says which of several data sets a row is from."""

FEWEST_ROWS = 3
"""Of a client's data set: one to train, one to validate and one to test."""

FEWEST_WITHOUT_TEST = 10
"""The same if rows for the server's test are taken from the clients' data sets, a fifth of all."""

ROWS = "rows"
"""Name of the file if there are no splits."""

KINDS = (
    "a path, a Hub id, a pandas DataFrame, a Dataset or DatasetDict of datasets, a list of rows as "
    "dicts, or a list of such data sets, one for each client"
)


def is_in_memory(data: object) -> bool:
    """Whether data are rows, and not the name of a file, a folder or a data set of the Hub."""
    return not isinstance(data, str | Path)


def number_of_clients(data: object) -> int | None:
    """Return the number of data sets, if data in memory are one for each client."""
    if not is_in_memory(data) or _has_splits(data):
        return None
    clients = _named_clients(data)
    return None if clients is None else len(clients)


def write_data(data: Any, test: Any, folder: Path) -> dict[str, Any]:
    """Write data to ``folder/HASH`` as Parquet, and return the settings that read them.

    The same data are written once. Several data sets, one for each client, become one with an owner
    column.

    Args:
        data: as :func:`droppeft.run` takes it.
        test: rows to test on, or a file with them; ``None`` if they are part of ``data``, or a part
            of the rows is to be held out.
        folder: for all data sets in memory.

    Returns:
        ``data``; and ``clients``, ``cohort_size`` and ``partition`` for several data sets.

    Raises:
        DroppeftError: the data are of an unknown kind, have no rows, or cannot be written.
    """
    settings: dict[str, Any] = {}
    if (splits := _splits(data)) is None:
        clients = _clients(data)
        if clients is not None:
            fewest = FEWEST_WITHOUT_TEST if test is None else FEWEST_ROWS
            splits = {"train": _joined(clients, fewest)}
            settings["clients"] = len(clients)
            settings["partition"] = {"kind": "natural", "key": OWNER, "min_rows": FEWEST_ROWS}
        else:
            splits = {"train": _table(data, "data")}
    if test is not None:
        if len(splits) > 1:
            raise DroppeftError("give the rows to test on either in data or in test, not in both")
        splits["test"] = _table(test, "test")
    if len(splits) == 1:  # a part of the rows is held out
        [rows] = splits.values()
        splits = {ROWS: rows}
    return {**settings, "data": str(_written(splits, folder))}


def _written(splits: Mapping[str, pa.Table], folder: Path) -> Path:
    """Write the splits; rows without splits are a file, of which the run holds out a part."""
    contents = {name: _as_parquet(table) for name, table in splits.items()}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(name.encode() + content)
    inside = folder / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside.mkdir(mode=0o700, exist_ok=True)
        for name, content in contents.items():
            if not (inside / f"{name}.parquet").exists():
                write_atomically(inside / f"{name}.parquet", content, private=True)
    except OSError as error:
        raise DroppeftError(f"{inside}: cannot be written ({error.strerror}); set out") from None
    return (inside / f"{ROWS}.parquet" if ROWS in contents else inside).absolute()


def _as_parquet(table: pa.Table) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written)
    return written.getvalue()


def in_words_of_python(message: str, written: str) -> str:
    """Reword an error about rows that were in memory: they have no path, and settings are dicts.

    Args:
        message: of the error.
        written: file or folder that the rows were written to.
    """
    path = re.escape(written)
    message = re.sub(rf"{path}/(\w+)\.parquet", r"the data (\1)", message)
    message = re.sub(rf"(data=)?{path}", "the data", message)
    message = _SETTINGS.sub(lambda found: _as_dict(found[0]), message)
    return _NAMES.sub(lambda found: _as_names(found.groups("")), message)


_VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s;,)'"]|,(?=\S))+"""
_SETTING = rf"source\.(?:{'|'.join(SourceConfig.model_fields)})={_VALUE}"
_SETTINGS = re.compile(
    rf"(?<![\w.]){_SETTING}(?: {_SETTING})*"
)  # not "datasource.url=…" in a label
_NAMES = re.compile(r"with source\.(\w+)(?: and source\.(\w+))?")


def _as_dict(settings: str) -> str:
    pairs = (word.removeprefix("source.").split("=", 1) for word in shlex.split(settings))
    return "source={" + ", ".join(f'"{key}": "{value}"' for key, value in pairs) + "}"


def _as_names(names: Sequence[str]) -> str:
    return "with source={" + ", ".join(f'"{name}": …' for name in names if name) + "}"


# One data set


def _has_splits(data: object) -> bool:
    return isinstance(data, Mapping) and ("train" in data or _is_of(data, "DatasetDict"))


def _splits(data: Any) -> dict[str, pa.Table] | None:
    """The splits of data that have some: a mapping with ``train``, such as a DatasetDict."""
    if not _has_splits(data):
        return None
    known = {"train", *TEST_SPLITS}
    if odd := [name for name in data if name not in known and not _is_of(data, "DatasetDict")]:
        raise DroppeftError(
            f"data has the splits {', '.join(map(str, data))}; rename {odd[0]}, or leave it out "
            f"(known are train, {', '.join(TEST_SPLITS)})"
        )
    return {str(name): _table(rows, f"data[{name!r}]") for name, rows in data.items()}


def _table(rows: Any, where: str) -> pa.Table:
    """Rows of any kind as a table; a path is read."""
    if not is_in_memory(rows):
        if not Path(rows).expanduser().is_file():
            raise DroppeftError(f"{where}={rows}: no such file")
        return read_file(Path(rows).expanduser()).table
    if _is_of(rows, "Series", "pandas"):
        raise DroppeftError(f"{where}: a Series has no labels; give a DataFrame")
    try:
        table = _converted(rows)
    except (pa.ArrowException, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DroppeftError(
            f"{where} cannot be made a table: {reason}; give the values of a column one type"
        ) from None
    if table is None:
        raise DroppeftError(f"{where} is of type {type(rows).__name__}; give {KINDS}")
    if not table.num_rows:
        raise DroppeftError(f"{where} has no rows")
    return table


def _converted(rows: Any) -> pa.Table | None:
    if isinstance(rows, pa.Table):
        return rows
    if _is_of(rows, "Dataset"):
        table = rows.with_format("arrow")[:]
        return table.replace_schema_metadata(rows.features.arrow_schema.metadata)
    if _is_of(rows, "DataFrame", "pandas"):
        table = pa.Table.from_pandas(rows, preserve_index=False)
        return table.replace_schema_metadata(None)
    if hasattr(rows, "__arrow_c_stream__"):  # data frames of other libraries
        return pa.table(rows)
    if _is_rows(rows):
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({str(name): [row.get(name) for row in rows] for name in names})
    if _is_columns(rows):
        return pa.table({str(name): list(values) for name, values in rows.items()})
    return None


def _is_of(value: object, kind: str, library: str = "datasets") -> bool:
    """Whether a value is of a class of a library, which is not imported for this."""
    module = sys.modules.get(library)
    return module is not None and isinstance(value, getattr(module, kind))


def _is_rows(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(row, Mapping) and not _is_columns(row) for row in value)
    )


def _is_plain(row: Sequence[object]) -> bool:
    """Whether a row has texts and numbers, without the names of their columns."""
    return len(row) > 0 and all(isinstance(value, str | int | float | None) for value in row)


def _is_columns(value: object) -> bool:
    """Whether a value is a mapping from names to lists of equal length that are no rows."""
    if not isinstance(value, Mapping) or not value:
        return False
    columns = list(value.values())
    return (
        all(isinstance(one, list | tuple) and not _is_rows(one) for one in columns)
        and len({len(one) for one in columns}) == 1
    )


# A data set for each client


def _clients(data: Any) -> list[tuple[str, pa.Table]] | None:
    """Name and rows of each client's data set, in their order; ``None`` for a single data set."""
    named = _named_clients(data)
    if named is None:
        return None
    if not named:
        raise DroppeftError(f"data is empty; give {KINDS}")
    width = len(str(len(named) - 1))
    return [
        (f"{place:0{width}d} {name}".strip(), _table(rows, f"data of client {name or place}"))
        for place, (name, rows) in enumerate(named)
    ]


def _named_clients(data: Any) -> list[tuple[str, Any]] | None:
    if isinstance(data, Mapping) and not _is_columns(data) and not _is_of(data, "Dataset"):
        return [(str(name), rows) for name, rows in data.items()]
    if isinstance(data, list | tuple) and not _is_rows(data):
        if data and all(isinstance(row, list | tuple) and _is_plain(row) for row in data):
            raise DroppeftError("give rows as dicts: {'text': …, 'label': …}")
        return [("", rows) for rows in data]
    return None


def _joined(clients: Sequence[tuple[str, pa.Table]], fewest: int) -> pa.Table:
    """One table with a column that names the client; the order of the names is theirs."""
    tables = []
    for name, table in clients:
        if OWNER in table.column_names:
            raise DroppeftError(f"data of client {name}: rename its column {OWNER}")
        if table.num_rows < fewest:
            instead = f", or {FEWEST_ROWS} with test=" if fewest > FEWEST_ROWS else ""
            raise DroppeftError(
                f"data of client {name} has {counted(table.num_rows, 'row')}; each client needs "
                f"{fewest} or more{instead}"
            )
        tables.append(table.append_column(OWNER, pa.array([name] * table.num_rows)))
    first = tables[0].schema
    for (name, _), table in zip(clients, tables, strict=True):
        if set(table.column_names) != set(first.names) or table.schema.metadata != first.metadata:
            raise DroppeftError(
                f"data of client {name} has other columns or class names than that of the first "
                f"client ({', '.join(first.names[:-1])}); give all the same"
            )
    try:
        ordered = [table.select(first.names) for table in tables]
        return pa.concat_tables(ordered, promote_options="permissive")
    except pa.ArrowException:
        raise DroppeftError(
            "a column has another type in another client's data; give all the same"
        ) from None
