"""Where files that can be rebuilt at any time are kept; ours, after the XDG base directories."""

import contextlib
import os
import tempfile
from pathlib import Path


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
        _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
