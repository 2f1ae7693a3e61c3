"""Read the splits of a data set from a folder, a file or the hub. Ours.

Local files are read by :mod:`droppeft.table_files`, which writes no cache. Data sets of the hub are
cached by the datasets library, which also reads the folders that it saved.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from droppeft.config import SourceConfig
from droppeft.config.task_detection import is_saved_dataset
from droppeft.errors import DroppeftError
from droppeft.table_files import SPREADSHEETS, SUFFIXES, is_table_file, read_table, stem_of

TEST_SPLITS = ("test", "validation", "validation_matched", "dev")
"""Names of the test split, tried in this order if the configuration does not name it."""

VALIDATION_SPLITS = ("validation", "validation_matched", "dev")
"""Names of the validation split of a client's own data."""

Part = Literal["train", "validation", "test"]

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


@dataclass(frozen=True)
class NamedSplits:
    """Splits that have not been read yet.

    Attributes:
        where: their name in error messages.
        readers: read a split, by its name.
    """

    where: str
    readers: Mapping[str, Callable[[], Split]]

    def read(self, name: str, setting: str) -> Split:
        """Read a split; an error about its name advises to use ``setting``."""
        if name not in self.readers:
            raise DroppeftError(
                f"{self.where} has no split {name}, only {', '.join(sorted(self.readers))}; "
                f"name one with {setting}"
            )
        return self.readers[name]()


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
    found = _splits_of(data, source)
    if isinstance(found, Split):
        return found, None
    train = source.train or "train"
    test = source.test or _first_of(TEST_SPLITS, found, train)
    if train == test:
        raise DroppeftError(f"{found.where}: {train} cannot be both source.train and source.test")
    return (
        found.read(train, "source.train"),
        None if test is None else found.read(test, "source.test"),
    )


def read_test_split(data: str, source: SourceConfig) -> Split:
    """Read the test split of a folder or a data set of the hub, or all rows of a single file.

    Args:
        data: as in :func:`read_splits`.
        source: name of the split, if it is not one of ``TEST_SPLITS``.

    Raises:
        DroppeftError: the data cannot be found or read, or there is no test split.
    """
    found = _splits_of(data, source)
    if isinstance(found, Split):
        return found
    test = source.test or _first_of(TEST_SPLITS, found)
    return found.read("test" if test is None else test, "source.test")


def read_parts(data: str, source: SourceConfig) -> dict[Part, Split]:
    """Read the splits of a client's own data.

    Args:
        data: as in :func:`read_splits`.
        source: names of the training and test split, if they are not ``train`` and ``test``.

    Returns:
        The training split, or all rows of a single file, and a split of ``VALIDATION_SPLITS`` and
        the test split where there are such.

    Raises:
        DroppeftError: the data cannot be found or read, or a split does not exist.
    """
    found = _splits_of(data, source)
    if isinstance(found, Split):
        return {"train": found}
    train, test = source.train or "train", source.test or _first_of(("test",), found)
    parts: dict[Part, Split] = {"train": found.read(train, "source.train")}
    if validation := _first_of(VALIDATION_SPLITS, found, train, test):
        parts["validation"] = found.readers[validation]()
    if test is not None:
        parts["test"] = found.read(test, "source.test")
    return parts


def _first_of(names: Sequence[str], found: NamedSplits, *others: str | None) -> str | None:
    """The first name that a split has and that is none of the others."""
    return next((name for name in names if name in found.readers and name not in others), None)


def _splits_of(data: str, source: SourceConfig) -> NamedSplits | Split:
    """The splits of a data set, or all rows of a single file."""
    path = Path(data).expanduser()
    if path.is_dir():
        return _of_folder(path, source)
    if path.is_file():
        return _single_file(path, source)
    check_found(data)
    return _of_hub(data)


def check_found(data: str) -> None:
    """Refuse the name of a file or folder that does not exist; other names are ids of the hub.

    Raises:
        DroppeftError: there is no such file or folder.
    """
    path = Path(data).expanduser()
    if not _looks_like_path(data) or path.exists():
        return
    beside: list[str] = []
    with contextlib.suppress(OSError):  # no such folder either, or it cannot be read
        beside = sorted(other.name for other in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, beside, 1, 0.8)
    hint = f"; did you mean {Path(data).with_name(near[0])}?" if near else ""
    raise DroppeftError(f"data={data}: no such file or folder{hint}")


def _single_file(path: Path, source: SourceConfig) -> Split:
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


def _of_folder(path: Path, source: SourceConfig) -> NamedSplits | Split:
    """The splits of a folder whose files are named after them.

    A folder with one file that has another name is this file.
    """
    if is_saved_dataset(path):
        return _saved_splits(path)
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
        return _single_file(first[0], source)
    return NamedSplits(str(path), {name: partial(_joined, some) for name, some in files.items()})


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


def _saved_splits(path: Path) -> NamedSplits | Split:
    """What ``save_to_disk`` of the datasets library wrote: one data set, or one per split."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library does not wrap errors of files and formats
        raise DroppeftError(f"{path}: cannot be read as a saved data set: {_line(error)}") from None
    if isinstance(loaded, datasets.Dataset):
        return _from_datasets(loaded, str(path))
    return _named(loaded, str(path))


def _of_hub(data: str) -> NamedSplits:
    """Load a data set of the hub, ``id`` or ``id:configuration``."""
    import datasets

    name, _, configuration = data.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library does not wrap errors of HTTP, files and formats
        raise DroppeftError(
            f"data={data} is no file or folder, and loading it from the hub failed: {_line(error)}"
        ) from None
    return _named(loaded, data)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _named(loaded: Mapping[str, Any], where: str) -> NamedSplits:
    readers = {
        name: partial(_from_datasets, one, f"{where} ({name})") for name, one in loaded.items()
    }
    return NamedSplits(where, readers)


def _from_datasets(dataset: Any, where: str) -> Split:
    table = dataset.with_format("arrow")[:]
    return Split(table.replace_schema_metadata(dataset.features.arrow_schema.metadata), where)


def read_file(path: Path) -> Split:
    """Read all rows of a file.

    Raises:
        DroppeftError: it has no rows or cannot be read, or its suffix is unknown.
    """
    found = read_table(path)
    return Split(found.table, str(path), found.remarks, has_header=found.has_header)
