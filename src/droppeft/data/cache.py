"""Where files that can be rebuilt at any time are kept; ours, after the XDG base directories."""

import contextlib
import os
from pathlib import Path

from droppeft.files import write_atomically


def cache_dir() -> Path:
    """``$DROPPEFT_CACHE``, else ``droppeft`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    The folder need not exist: :func:`store` makes it.
    """
    if own := os.environ.get("DROPPEFT_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "droppeft"


def store(path: Path, content: bytes) -> None:
    """Write a cache file so that a reader sees all of it or none.

    A cache that cannot be written (read-only, full disk) costs time, not the run: the error is
    swallowed and no part of the file stays behind.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
