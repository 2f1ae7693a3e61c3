"""Read the splits of a data set from a folder, a file or the hub. Ours.

Local files are read with pyarrow, which writes no cache. Data sets of the hub are cached by the
datasets library.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from droppeft.config import SourceConfig
from droppeft.errors import DroppeftError

TEST_SPLITS = ("test", "validation", "validation_matched", "dev")
"""Names of the test split, tried in this order if the configuration does not name it."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_CHANGED_TYPE = re.compile(r"Column\(/(.*)\) changed from (\w+) to (\w+) in row (\d+)")


class Split:
    """The rows of a split, and its name in error messages."""

    def __init__(self, table: pa.Table, where: str) -> None:
        if table.num_rows == 0:
            raise DroppeftError(f"{where} has no rows")
        self.table = table
        self.where = where

    def column(self, name: str, setting: str) -> pa.ChunkedArray:
        """Return a column without missing values; errors name ``setting`` as its origin."""
        if self.table.column_names.count(name) != 1:
            raise DroppeftError(
                f"{self.where} has no column {name} ({setting}), or has it twice; "
                f"columns: {', '.join(self.table.column_names)}"
            )
        column = self.table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if column.null_count:
            row = pc.index(column.is_null(), True).as_py()
            raise DroppeftError(f"{self.where}: {name} is missing in row {row + 1}")
        return column


def read_splits(
    data: str, source: SourceConfig, *, needs_test: bool = True
) -> tuple[Split, Split | None]:
    """Read the training and test split of a folder, a file or a data set of the hub.

    Args:
        data: a folder of .parquet, .csv, .jsonl or .json files that are named after their splits,
            a single file, or an id on the hub with ``:name`` after it to choose a configuration.
        source: names of the splits, if they are not ``train`` and one of ``TEST_SPLITS``.
        needs_test: whether a folder or data set without a test split is refused.

    Returns:
        The training split, or all rows of a single file, and the test split. The latter is ``None``
        for a single file, and if there is none and ``needs_test`` is false.

    Raises:
        DroppeftError: the data cannot be found or read, or a split does not exist.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        return folder_splits(path, source, needs_test=needs_test)
    if path.is_file():
        for setting in ("train", "test"):
            if getattr(source, setting) is not None:
                raise DroppeftError(f"source.{setting} does not apply to the single file {path}")
        return read_file(path), None
    if _looks_like_path(data):
        raise DroppeftError(f"data={data}: no such file or folder")
    return hub_splits(data, source, needs_test=needs_test)


def _looks_like_path(data: str) -> bool:
    return data.startswith((".", "/", "~")) or data.count("/") > 1 or data.endswith(tuple(READERS))


def folder_splits(
    path: Path, source: SourceConfig, *, needs_test: bool = True
) -> tuple[Split, Split | None]:
    """Read the training and test split of a folder whose files are named after their splits."""
    files: dict[str, list[Path]] = {}
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        raise DroppeftError(f"{path}: cannot be read ({error.strerror})") from None
    for file in inside:
        if file.suffix in READERS:
            files.setdefault(_SHARD.sub("", file.stem), []).append(file)
    if not files:
        raise DroppeftError(f"{path} has no {', '.join(READERS)} file")
    train, test = _choose(files, source, str(path), needs_test)
    return _joined(files[train]), _joined(files[test]) if test else None


def _joined(files: Sequence[Path]) -> Split:
    if len(files) == 1:
        return read_file(files[0])
    if not all(_SHARD.search(file.stem) for file in files):
        raise DroppeftError(
            f"{files[0]} and {files[1].name} are the same split; remove one of them"
        )
    where = f"{files[0]} and its other shards"
    try:
        return Split(pa.concat_tables([read_file(file).table for file in files]), where)
    except pa.ArrowInvalid:
        raise DroppeftError(f"{where} have different columns") from None


def hub_splits(
    data: str, source: SourceConfig, *, needs_test: bool = True
) -> tuple[Split, Split | None]:
    """Load the training and test split of a data set on the hub, ``id`` or ``id:configuration``."""
    import datasets

    name, _, configuration = data.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library does not wrap errors of HTTP, files and formats
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DroppeftError(
            f"data={data} is no file or folder, and loading it from the hub failed: {reason}"
        ) from None
    train, test = _choose(loaded, source, data, needs_test)
    return (
        _from_hub(loaded[train], f"{data} ({train})"),
        _from_hub(loaded[test], f"{data} ({test})") if test else None,
    )


def _from_hub(dataset: Any, where: str) -> Split:
    table = dataset.with_format("arrow")[:]
    return Split(table.replace_schema_metadata(dataset.features.arrow_schema.metadata), where)


def _choose(
    splits: Mapping[str, object], source: SourceConfig, where: str, needs_test: bool
) -> tuple[str, str | None]:
    train = source.train or "train"
    others = (name for name in TEST_SPLITS if name in splits and name != train)
    test = source.test or next(others, None)
    for name, wanted in (("train", train), ("test", test)):
        if wanted not in splits and (needs_test or wanted):
            missing = wanted or f"{', '.join(TEST_SPLITS[:-1])} or {TEST_SPLITS[-1]}"
            raise DroppeftError(
                f"{where} has no split {missing}, only {', '.join(sorted(splits))}; "
                f"name one with source.{name}"
            )
    if train == test:
        raise DroppeftError(f"{where}: {train} cannot be both source.train and source.test")
    return train, test


def read_file(path: Path) -> Split:
    """Read all rows of a .parquet, .csv, .jsonl or .json file."""
    read = READERS.get(path.suffix)
    if read is None:
        raise DroppeftError(f"{path} is not one of {', '.join(READERS)}")
    try:
        return Split(read(path), str(path))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DroppeftError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from None


def _read_parquet(path: Path) -> pa.Table:
    # pyarrow.parquet.read_table would add columns for folder names such as "fold=3".
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read()


def _read_csv(path: Path) -> pa.Table:
    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(block_size=_whole(path)),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
    )


def _read_json_lines(path: Path) -> pa.Table:
    return _table_of_lines(path.read_bytes(), path)


def _read_json(path: Path) -> pa.Table:
    """Read a list of objects; many files with this suffix hold a JSON object per line instead."""
    content = path.read_bytes()
    if not content.lstrip().startswith(b"["):
        return _table_of_lines(content, path)
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise DroppeftError(f"{path} is not valid JSON: {error}; correct it") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DroppeftError(f"{path}: row {number} is not an object with columns; correct it")
    return _table_of_lines("".join(json.dumps(row) + "\n" for row in rows).encode(), path)


def _table_of_lines(content: bytes, path: Path) -> pa.Table:
    try:
        # One block for the whole file: types are inferred from all rows.
        options = pyarrow.json.ReadOptions(block_size=min(len(content) + 1, 2**31 - 1))
        return pyarrow.json.read_json(io.BytesIO(content), read_options=options)
    except pa.ArrowInvalid as error:
        if changed := _CHANGED_TYPE.search(str(error)):
            name, before, now, row = changed.groups()
            raise DroppeftError(
                f"{path}: row {int(row) + 1}: {name.replace('/', '.')} is of type {now}, and "
                f"elsewhere {before}; use one type"
            ) from None
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip() and (wrong := _wrong_with(line)):
                raise DroppeftError(
                    f"{path}: line {number} {wrong}; correct or remove it"
                ) from None
        raise


def _wrong_with(line: bytes) -> str | None:
    try:
        value = json.loads(line)
    except ValueError as error:
        return f"is not valid JSON ({error})"
    return None if isinstance(value, dict) else "is not a JSON object"


def _whole(path: Path) -> int:
    """Return a block size that reads the file as one block: types are inferred from all rows."""
    return min(path.stat().st_size + 1, 2**31 - 1)


READERS = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
}
