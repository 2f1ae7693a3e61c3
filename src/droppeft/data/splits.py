"""Read the splits of a data set from a folder, a file or the hub. Ours.

Local files are read by :mod:`droppeft.table_files`, which writes no cache. Data sets of the hub are
cached by the datasets library, which also reads the folders that it saved.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from droppeft.config import SourceConfig
from droppeft.config.task_detection import is_saved_dataset
from droppeft.errors import DroppeftError
from droppeft.table_files import SPREADSHEETS, SUFFIXES, is_table_file, read_table, stem_of

TEST_SPLITS = ("test", "validation", "validation_matched", "dev")
"""Names of the test split, tried in this order if the configuration does not name it."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


class Split:
    """The rows of a split.

    Attributes:
        table: the rows.
        where: its name in error messages.
        remarks: what is unusual about how it was read, as parts of sentences.
        has_header: whether a line with the names of the columns precedes the rows.
    """

    def __init__(
        self,
        table: pa.Table,
        where: str,
        remarks: Iterable[str] = (),
        *,
        has_header: bool = False,
    ) -> None:
        if table.num_rows == 0:
            raise DroppeftError(f"{where} has no rows")
        self.table = table
        self.where = where
        self.remarks = tuple(remarks)
        self.has_header = has_header

    @property
    def numbering(self) -> str:
        """How rows are counted, to follow their numbers in error messages."""
        return ", counted without the header" if self.has_header else ""

    def column(self, name: str, setting: str) -> pa.ChunkedArray:
        """Return a column, without its dictionary; errors name ``setting`` as its origin."""
        names = self.table.column_names
        if names.count(name) > 1:
            raise DroppeftError(f"{self.where} has the column {name} twice; rename or remove one")
        if name not in names:
            near = [other for other in names if other.casefold() == name.casefold()]
            near = near or difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near and near[0] != name else ""
            raise DroppeftError(
                f"{self.where} has no column {name} ({setting}); columns: {', '.join(names)}{hint}"
            )
        column = self.table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return column


def read_splits(data: str, source: SourceConfig) -> tuple[Split, Split | None]:
    """Read the training and test split of a folder, a file or a data set of the hub.

    Args:
        data: a folder of files that are named after their splits, or that the datasets library
            saved; a single file; or an id on the hub with ``:name`` after it to choose a
            configuration. :data:`~droppeft.table_files.SUFFIXES` lists the types of files.
        source: names of the splits, if they are not ``train`` and one of ``TEST_SPLITS``.

    Returns:
        The training split, or all rows of a single file, and the test split. The latter is ``None``
        for a single file, and if there is none.

    Raises:
        DroppeftError: the data cannot be found or read, or a split does not exist.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        return folder_splits(path, source)
    if path.is_file():
        return single_file(path, source), None
    if _looks_like_path(data):
        raise DroppeftError(f"data={data}: no such file or folder")
    return hub_splits(data, source)


def single_file(path: Path, source: SourceConfig) -> Split:
    """Read a file that holds all rows; names of splits are refused."""
    for setting in ("train", "test"):
        if getattr(source, setting) is not None:
            raise DroppeftError(f"source.{setting} does not apply to the single file {path}")
    return read_file(path)


def _looks_like_path(data: str) -> bool:
    path = Path(data)
    return (
        data.startswith((".", "/", "~"))
        or data.count("/") > 1
        or is_table_file(path)
        or path.suffix.lower() in SPREADSHEETS
        or ("/" not in data and path.suffix[1:].isalpha())
    )


def folder_splits(path: Path, source: SourceConfig) -> tuple[Split, Split | None]:
    """Read the training and test split of a folder whose files are named after their splits.

    A folder with one file that has another name is this file.
    """
    if is_saved_dataset(path):
        return _saved_splits(path, source)
    files: dict[str, list[Path]] = {}
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        raise DroppeftError(f"{path}: cannot be read ({error.strerror})") from None
    for file in filter(is_table_file, inside):
        files.setdefault(_SHARD.sub("", stem_of(file)), []).append(file)
    if not files:
        raise DroppeftError(f"{path} has no {', '.join(SUFFIXES)} file")
    [first, *others] = files.values()
    if not others and len(first) == 1 and not {"train", source.train} & set(files):
        return single_file(first[0], source), None
    train, test = _choose(files, source, str(path))
    return _joined(files[train]), _joined(files[test]) if test else None


def _joined(files: Sequence[Path]) -> Split:
    if len(files) == 1:
        return read_file(files[0])
    if not all(_SHARD.search(stem_of(file)) for file in files):
        raise DroppeftError(
            f"{files[0]} and {files[1].name} are the same split; remove one of them"
        )
    where = f"{files[0]} and its other shards"
    shards = [read_file(file) for file in files]
    try:
        table = pa.concat_tables([shard.table for shard in shards])
    except pa.ArrowInvalid:
        raise DroppeftError(f"{where} have different columns") from None
    return Split(table, where, dict.fromkeys(text for one in shards for text in one.remarks))


def _saved_splits(path: Path, source: SourceConfig) -> tuple[Split, Split | None]:
    """Read what ``save_to_disk`` of the datasets library wrote: one data set, or one per split."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library does not wrap errors of files and formats
        raise DroppeftError(f"{path}: cannot be read as a saved data set: {_line(error)}") from None
    if isinstance(loaded, datasets.Dataset):
        return _from_datasets(loaded, str(path)), None
    return _chosen(loaded, source, str(path))


def hub_splits(data: str, source: SourceConfig) -> tuple[Split, Split | None]:
    """Load the training and test split of a data set on the hub, ``id`` or ``id:configuration``."""
    import datasets

    name, _, configuration = data.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library does not wrap errors of HTTP, files and formats
        raise DroppeftError(
            f"data={data} is no file or folder, and loading it from the hub failed: {_line(error)}"
        ) from None
    return _chosen(loaded, source, data)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _chosen(
    loaded: Mapping[str, Any], source: SourceConfig, where: str
) -> tuple[Split, Split | None]:
    train, test = _choose(loaded, source, where)
    return (
        _from_datasets(loaded[train], f"{where} ({train})"),
        _from_datasets(loaded[test], f"{where} ({test})") if test else None,
    )


def _from_datasets(dataset: Any, where: str) -> Split:
    table = dataset.with_format("arrow")[:]
    return Split(table.replace_schema_metadata(dataset.features.arrow_schema.metadata), where)


def _choose(
    splits: Mapping[str, object], source: SourceConfig, where: str
) -> tuple[str, str | None]:
    train = source.train or "train"
    others = (name for name in TEST_SPLITS if name in splits and name != train)
    test = source.test or next(others, None)
    for name, wanted in (("train", train), ("test", test)):
        if wanted is not None and wanted not in splits:
            raise DroppeftError(
                f"{where} has no split {wanted}, only {', '.join(sorted(splits))}; "
                f"name one with source.{name}"
            )
    if train == test:
        raise DroppeftError(f"{where}: {train} cannot be both source.train and source.test")
    return train, test


def read_file(path: Path) -> Split:
    """Read all rows of a file.

    Raises:
        DroppeftError: it has no rows or cannot be read, or its suffix is unknown.
    """
    found = read_table(path)
    return Split(found.table, str(path), found.remarks, has_header=found.has_header)
