"""Folders of models in the cache folder that are made once; ours."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from droppeft.data.cache import cache_dir
from droppeft.errors import DroppeftError
from droppeft.files import make_private, remove_left_behind


def models_folder() -> Path:
    """Return the folder of models in the cache folder; it need not exist."""
    return cache_dir() / "models"


def cached_folder(name: str, model: str, make: Callable[[Path], None]) -> Path:
    """Return a folder in the cache folder, and make it if it does not exist.

    It appears whole or not at all, also if several processes make it at the same time.

    Args:
        name: of the folder; another content needs another name.
        model: the setting ``model``, for the message.
        make: fills an empty folder.

    Raises:
        DroppeftError: the folder cannot be written, as on a full disk.
    """
    folder = models_folder() / name
    if folder.is_dir():
        return folder
    try:
        make_private(folder.parent)
        remove_left_behind(folder.parent, "*")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
            made = Path(scratch) / name
            made.mkdir()
            make(made)
            _rename(made, folder)
    except OSError as error:
        raise DroppeftError(
            f"model={model} cannot be unpacked into {folder.parent} ({error.strerror or error}); "
            "make room, or set DROPPEFT_CACHE to another folder"
        ) from None
    return folder


def _rename(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
