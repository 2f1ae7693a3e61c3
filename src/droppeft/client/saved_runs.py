"""What runs have saved on this machine: for ``droppeft node state``. Ours."""

import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from string import hexdigits

from droppeft.cached_layers.cached_layers import STATES, state_folder
from droppeft.client.client_state import state_dir
from droppeft.data.cache import cache_dir
from droppeft.errors import DroppeftError


@dataclass(frozen=True)
class SavedRun:
    """What a run has saved on this machine.

    Attributes:
        run: its name.
        clients: number of clients that have saved tensors or hidden states.
        state_bytes: bytes of tensors, which cannot be computed again.
        cached_bytes: bytes of hidden states, which can.
        changed: when something was last written.
    """

    run: str
    clients: int
    state_bytes: int
    cached_bytes: int
    changed: datetime


def saved_runs() -> list[SavedRun]:
    """Return all runs that have saved something, the newest first."""
    return sorted(map(_saved, _names()), key=lambda one: (one.changed, one.run), reverse=True)


def delete_run(run: str) -> None:
    """Delete all that a run has saved on this machine.

    Raises:
        DroppeftError: it has saved nothing, or a file cannot be deleted.
    """
    if run not in _names():
        raise DroppeftError(
            f"run {run} has saved nothing on this machine; list all with: droppeft node state"
        )
    for folder in filter(Path.is_dir, _of_run(run)):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise DroppeftError(f"{error.filename}: cannot be deleted ({error.strerror})") from None


def _names() -> set[str]:
    found = {path.name for top in (state_dir(), cache_dir() / STATES) for path in _inside(top)}
    return {name for name in found if {*name} <= {*hexdigits.lower()}}


def _of_run(run: str) -> tuple[Path, Path]:
    """The folders of its tensors and of its hidden states."""
    return state_dir() / run, state_folder(run)


def _inside(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _saved(run: str) -> SavedRun:
    tensors, cached = _of_run(run)
    every = [path for folder in (tensors, cached) for path in (folder, *folder.rglob("*"))]
    clients = {path.name for folder in (tensors, cached) for path in _inside(folder)}
    newest = max(path.stat().st_mtime for path in every if path.exists())
    return SavedRun(
        run, len(clients), _bytes(tensors), _bytes(cached), datetime.fromtimestamp(newest)
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
