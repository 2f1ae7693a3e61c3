"""The cache folder, for files that can be rebuilt.

Only their owner can read them, since they may hold texts or what can be inferred from texts: files
have the mode 0600 and the folders of droppeft inside the cache folder have 0700. A folder that has
further rights loses them at the next write. The cache folder itself is created with the mode 0700,
and is left as it is if it exists.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from platformdirs import user_cache_path

from droppeft.files import make_private, remove_left_behind, write_atomically

Value = TypeVar("Value")


def cache_dir() -> Path:
    """Return ``$DROPPEFT_CACHE``, or else ``droppeft`` in the platform's folder for caches.

    That is ``$XDG_CACHE_HOME`` or ``~/.cache`` on Linux. The folder may not exist yet;
    :func:`store` creates it.
    """
    return Path(os.environ.get("DROPPEFT_CACHE") or user_cache_path("droppeft"))


def store(path: Path, content: bytes) -> None:
    """Write a private cache file atomically: a reader sees all of it or none.

    If the file cannot be written, as on a full or read-only disk, the error is ignored and no part
    of the file remains.
    """
    with contextlib.suppress(OSError):
        make_private(path.parent)
        remove_left_behind(path.parent, "*")
        write_atomically(path, content, private=True)


def remembered(
    kind: str,
    key: str,
    compute: Callable[[], Value],
    to_text: Callable[[Value], str],
    from_text: Callable[[str], Value],
) -> Value:
    """Return a value from the cache folder if it is known there; else compute and store it.

    Args:
        kind: folder of such values.
        key: everything that the value depends on.
        compute: computes it.
        to_text: writes a value as ASCII.
        from_text: reads it; raises ValueError, LookupError or TypeError for a damaged text.
    """
    entry = cache_dir() / kind / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        return from_text(entry.read_text(encoding="ascii"))
    except (OSError, ValueError, LookupError, TypeError):
        value = compute()
        store(entry, to_text(value).encode())
        return value
