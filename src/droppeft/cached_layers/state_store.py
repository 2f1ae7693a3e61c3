"""Hidden states of a device's examples on its disk: bounded, whole or absent, going with the run.

Source: ours. A file per turn, or several when a turn builds much, so that few files are opened and
none is written twice.
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
from droppeft.messages import StateCache

SEGMENT_BYTES = 16 << 20
"""States that are held in memory before they are written."""

_NAME = re.compile(r"round-(\d{6})-(\d{4})\.safetensors")


class StateStore:
    """States by the digest of their example, as of the start of one turn.

    What a turn of this round or a later one has written is deleted at the start: those turns were
    interrupted, or belong to an earlier run of the same configuration. So what is found does not
    depend on either, and time that was saved in another life is not reported as a gain.

    When the files would exceed the limit the oldest go, whole; a single turn's states that are
    more than the limit are not kept beyond it.

    Args:
        folder: of one device; made when first needed.
        content: names everything that the states depend on beside their example. Files of another
            content are deleted.
        round: of this turn.
        cache: precision of the states, and most bytes of all files together.
    """

    def __init__(self, folder: Path, content: str, round: int, cache: StateCache) -> None:
        self.precision = cache.precision
        self._folder, self._content, self._round = folder, content, round
        self._limit = cache.limit_bytes
        self._new: dict[str, torch.Tensor] = {}
        self._new_bytes = self._written = 0
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        for path in _segments(folder):
            if _round_of(path) < round:
                self._open(path)
            else:
                self._forget(path)

    def get(self, digest: str) -> torch.Tensor | None:
        """The states of an example, or ``None``."""
        if digest in self._new:
            return self._new[digest]
        path = self._where.get(digest)
        if path is None:
            return None
        states: torch.Tensor = self._files[path].get_tensor(digest)
        return states

    def put(self, digest: str, states: torch.Tensor) -> None:
        """Keep the states of an example; they are on disk after :meth:`flush` at the latest."""
        self._new[digest] = states
        self._new_bytes += states.nbytes
        if self._new_bytes >= min(SEGMENT_BYTES, self._limit):
            self.flush()

    def flush(self) -> None:
        """Write what is new. A disk that is full costs time later, not the turn."""
        if not self._new:
            return
        content = safetensors.torch.save(self._new, metadata={"content": self._content})
        self._new, self._new_bytes = {}, 0
        self._make_room(len(content))
        if len(content) > self._limit:
            return
        with contextlib.suppress(OSError):  # texts can be guessed from states: nobody else's
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / f"round-{self._round:06}-{self._written:04}.safetensors"
        self._written += 1
        store(path, content)
        self._open(path)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in _segments(self._folder))

    def _open(self, path: Path) -> None:
        """Note what a file holds; one that is damaged or of another content goes."""
        try:
            file: Any = safetensors.safe_open(path, framework="pt")
        except (OSError, safetensors.SafetensorError):
            self._forget(path)
            return
        if (file.metadata() or {}).get("content") != self._content:
            self._forget(path)
            return
        self._files[path] = file
        self._where |= dict.fromkeys(file.keys(), path)

    def _make_room(self, needed: int) -> None:
        for path in _segments(self._folder):
            if self.bytes + needed <= self._limit:
                return
            self._forget(path)

    def _forget(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
        self._files.pop(path, None)
        self._where = {digest: other for digest, other in self._where.items() if other != path}


def digest_of(*columns: bytes) -> str:
    """Name an example by all that the model reads of it."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(f"{len(column)}|".encode() + column)
    return digest.hexdigest()[:32]


def _segments(folder: Path) -> Iterator[Path]:
    """Oldest first."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _round_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0
