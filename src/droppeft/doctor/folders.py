"""Where a run writes, and how much room there is; ours."""

import os
import shutil
import tempfile
from pathlib import Path

from droppeft.data.cache import cache_dir
from droppeft.doctor.finding import Finding, note, ok, problem, size
from droppeft.errors import DroppeftError

FULL_BYTES = 50e6
"""Less is not enough for the checkpoints of a run."""

LOW_BYTES = 1e9


def check_runs_folder() -> Finding:
    """``runs`` in the current folder, where a run goes unless --out says otherwise."""
    remedy = "droppeft run --out ~/droppeft-run"
    try:
        folder = Path.cwd() / "runs"
    except FileNotFoundError:
        return problem("the current folder is gone", "cd ~")
    if reason := why_not(folder):
        return problem(f"{folder} {reason}", remedy)
    return _with_room(folder, remedy)


def check_cache_folder() -> Finding:
    """The cache; without it the built-in data are built anew in every run."""
    folder, remedy = cache_dir(), "export DROPPEFT_CACHE=~/droppeft-cache"
    if reason := why_not(folder):
        return note(f"{folder} {reason}; every run prepares its data anew", remedy)
    return _with_room(folder, remedy)


def check_state_folder() -> Finding:
    """Where clients keep what is their own; without it `method=local` does not work."""
    from droppeft.client.client_state import state_dir  # loads numpy, which may be what is broken

    remedy = "export DROPPEFT_STATE=~/droppeft-state"
    try:
        folder = state_dir()
    except DroppeftError as error:
        return problem(f"{error}", remedy)
    if reason := why_not(folder):
        return note(f"{folder} {reason}; clients cannot keep anything to themselves", remedy)
    return _with_room(folder, remedy)


def check_temporary_folder() -> Finding:
    """The system's folder, for what libraries put aside."""
    remedy = "export TMPDIR=~"
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        return problem(f"{error.strerror}", remedy)
    if reason := why_not(folder):
        return note(f"{folder} {reason}", remedy)
    return _with_room(folder, remedy)


def why_not(folder: Path) -> str | None:
    """Why nothing can be written to a folder, which need not exist yet."""
    there = _existing(folder)
    try:  # permissions do not tell: the file system may be read-only, or the user root
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    free = shutil.disk_usage(there).free
    return f"is full: {size(free)} left" if free < FULL_BYTES else None


def _with_room(folder: Path, remedy: str) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    found = f"{folder}, {size(free)} free"
    return ok(found) if free >= LOW_BYTES else note(f"{found}: that is little", remedy)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
