"""Stores the hidden states of a client's rows on disk, up to a limit.

Each local training writes one file, or several if it computes many states. So few files are opened,
and none is written twice. Ours.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from droppeft.data.cache import store
from droppeft.messages.instruction import StateCache

SEGMENT_BYTES = 16 << 20
"""Bytes of states that are collected in memory before they are written."""

_NAME = re.compile(r"round-(\d{6})-(\d{4})\.safetensors")


class StateStore:
    """Stored states, by the digest of their row, in one local training.

    Files of this round or a later one are deleted first. They come from a local training that was
    interrupted, and a resumed run must find, and report, the same as an uninterrupted one.

    If the files would exceed the limit, the oldest are deleted. A file that is larger than the
    limit is not written.

    Args:
        folder: folder of one client; created when it is needed.
        content: identifies everything that the states depend on, except the row. Files with
            another content are deleted.
        round: round of this local training.
        cache: precision of the states, and the limit for the bytes of all files together.
    """

    def __init__(self, folder: Path, content: str, round: int, cache: StateCache) -> None:
        self.precision = cache.precision
        self._folder, self._content, self._round = folder, content, round
        self._limit = cache.limit_bytes
        self._new: dict[str, torch.Tensor] = {}
        self._new_bytes = self._written = 0
        self._files: dict[Path, Any] = {}
        self._path_of: dict[str, Path] = {}
        for path in _segments(folder):
            if _round_of(path) < round:
                self._open(path)
            else:
                self._delete(path)

    def get(self, digest: str) -> torch.Tensor | None:
        """Return the states of a row, or ``None`` if they are not stored."""
        if digest in self._new:
            return self._new[digest]
        path = self._path_of.get(digest)
        if path is None:
            return None
        states: torch.Tensor = self._files[path].get_tensor(digest)
        return states

    def put(self, digest: str, states: torch.Tensor) -> None:
        """Store the states of a row; they are on disk after :meth:`flush` at the latest."""
        self._new[digest] = states
        self._new_bytes += states.nbytes
        if self._new_bytes >= min(SEGMENT_BYTES, self._limit):
            self.flush()

    def flush(self) -> None:
        """Write new states to disk. If the disk is full they are lost, which is no error."""
        if not self._new:
            return
        content = safetensors.torch.save(self._new, metadata={"content": self._content})
        self._new, self._new_bytes = {}, 0
        self._make_room(len(content))
        if len(content) > self._limit:
            return
        path = self._folder / f"round-{self._round:06}-{self._written:04}.safetensors"
        self._written += 1
        store(path, content)
        self._open(path)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in _segments(self._folder))

    def _open(self, path: Path) -> None:
        """Register the states of a file; delete it if it is damaged or has another content."""
        try:
            file: Any = safetensors.safe_open(path, framework="pt")
        except (OSError, safetensors.SafetensorError):
            self._delete(path)
            return
        if (file.metadata() or {}).get("content") != self._content:
            self._delete(path)
            return
        self._files[path] = file
        self._path_of |= dict.fromkeys(file.keys(), path)

    def _make_room(self, needed: int) -> None:
        for path in _segments(self._folder):
            if self.bytes + needed <= self._limit:
                return
            self._delete(path)

    def _delete(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
        self._files.pop(path, None)
        self._path_of = {digest: other for digest, other in self._path_of.items() if other != path}


def digest_of(*columns: bytes) -> str:
    """Return a digest of all columns that the model reads of a row."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(f"{len(column)}|".encode() + column)
    return digest.hexdigest()[:32]


def _segments(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, oldest first."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _round_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0
