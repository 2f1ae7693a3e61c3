"""The cache folder, for files that can be rebuilt."""

import contextlib
import os
from pathlib import Path

from platformdirs import user_cache_path

from droppeft.files import write_atomically


def cache_dir() -> Path:
    """Return ``$DROPPEFT_CACHE``, or else ``droppeft`` in the platform's folder for caches.

    That is ``$XDG_CACHE_HOME`` or ``~/.cache`` on Linux. The folder may not exist yet;
    :func:`store` creates it.
    """
    return Path(os.environ.get("DROPPEFT_CACHE") or user_cache_path("droppeft"))


def store(path: Path, content: bytes) -> None:
    """Write a cache file atomically: a reader sees all of it or none.

    If the file cannot be written, as on a full or read-only disk, the error is ignored and no part
    of the file remains.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
