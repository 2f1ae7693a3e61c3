"""Write files so that after a crash they have either the old content or the new content. Ours."""

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LEFT_BEHIND_S = 3600.0
"""Age in seconds at which a temporary file is taken to be left by a process that was killed."""


def write_atomically(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replace a file: write a temporary file beside it, fsync, rename, fsync the folder.

    The temporary name is unique. If two processes write the same file, a reader sees the whole
    content of one of them.

    Args:
        private: whether only the file's owner can read it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not private:
            partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_private(folder: Path) -> None:
    """Create a folder that only its owner can enter; an existing one loses the rights of others.

    Folders above it that do not exist are created with the same rights. Those that exist are left
    as they are, and so is a folder that belongs to another user.

    Raises:
        OSError: the folder cannot be created.
    """
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    for above in reversed(missing):
        above.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        with contextlib.suppress(PermissionError):
            folder.chmod(0o700)


def remove_left_behind(folder: Path, names: str, older_than_s: float = LEFT_BEHIND_S) -> None:
    """Delete temporary files and folders that killed processes left.

    Args:
        folder: in which they are.
        names: pattern of the final names, as ``round-*``; a temporary name begins with a point.
        older_than_s: leave those that have changed in the last so many seconds, because another
            process may be writing them.
    """
    for path in folder.glob(f".{names}"):
        with contextlib.suppress(OSError):  # another process may delete it too
            if time.time() - path.stat().st_mtime >= older_than_s:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_empty(folder: Path) -> None:
    """Remove a folder if it exists and nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def as_json(value: Any, indent: int | None = None) -> str:
    """Return a value as valid JSON: numbers that are not finite become ``null``.

    Args:
        value: of mappings, lists and plain values.
        indent: spaces of a level; ``None`` writes one line.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def as_json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as the content of a JSON Lines file, each as :func:`as_json` writes it."""
    return "".join(as_json(row) + "\n" for row in rows).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Flush a file's content, or the renames inside a folder, to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """Return the file mode mask of the process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
