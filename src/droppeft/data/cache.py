"""The cache folder, for files that can be rebuilt. Ours, after the XDG base directories."""

import contextlib
import os
from pathlib import Path

from droppeft.files import write_atomically


def cache_dir() -> Path:
    """Return ``$DROPPEFT_CACHE``, or else ``droppeft`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    The folder may not exist yet; :func:`store` creates it.
    """
    if folder := os.environ.get("DROPPEFT_CACHE"):
        return Path(folder)
    parent = os.environ.get("XDG_CACHE_HOME")
    return (Path(parent) if parent else Path.home() / ".cache") / "droppeft"


def store(path: Path, content: bytes) -> None:
    """Write a cache file atomically: a reader sees all of it or none.

    If the file cannot be written, as on a full or read-only disk, the error is ignored and no part
    of the file remains.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
