"""Checks of the folders that a run writes to, and of their free space; ours."""

import os
import shutil
import tempfile
from pathlib import Path

from droppeft.data.cache import cache_dir
from droppeft.doctor.finding import Finding, note, ok, problem, size
from droppeft.errors import DroppeftError

FULL_BYTES = 50e6
"""Less free space is not enough for the checkpoints of a run."""

LOW_BYTES = 1e9
"""Less free space is a note."""


def check_runs_folder() -> Finding:
    """Check ``runs`` in the current folder, where a run is written without ``--out``."""
    remedy = "droppeft run --out ~/droppeft-run"
    try:
        folder = Path.cwd() / "runs"
    except FileNotFoundError:
        return problem("the current folder no longer exists", "cd ~")
    if reason := why_not(folder):
        return problem(f"{folder} {reason}", remedy)
    return _with_room(folder, remedy)


def check_cache_folder() -> Finding:
    """Check the cache folder. Without it every run prepares its data again."""
    folder, remedy = cache_dir(), "export DROPPEFT_CACHE=~/droppeft-cache"
    if reason := why_not(folder):
        return note(f"{folder} {reason}; every run prepares its data again", remedy)
    return _with_room(folder, remedy)


def check_state_folder() -> Finding:
    """Check the folder of client states, which methods with personal layers need."""
    from droppeft.client.client_state import state_dir  # imports numpy, which may be broken

    remedy = "export DROPPEFT_STATE=~/droppeft-state"
    try:
        folder = state_dir()
    except DroppeftError as error:
        return problem(f"{error}", remedy)
    if reason := why_not(folder):
        return note(f"{folder} {reason}; clients cannot save their states", remedy)
    return _with_room(folder, remedy)


def check_temporary_folder() -> Finding:
    """Check the system's folder for temporary files, which libraries use."""
    remedy = "export TMPDIR=~"
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        return problem(f"{error.strerror}", remedy)
    if reason := why_not(folder):
        return note(f"{folder} {reason}", remedy)
    return _with_room(folder, remedy)


def why_not(folder: Path) -> str | None:
    """Why a folder cannot be written to, or ``None``; it need not exist yet."""
    existing = _existing(folder)
    try:  # permissions do not suffice: the file system may be read-only, or the user root
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    free = shutil.disk_usage(existing).free
    return f"is full: {size(free)} left" if free < FULL_BYTES else None


def _with_room(folder: Path, remedy: str) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    found = f"{folder}, {size(free)} free"
    return ok(found) if free >= LOW_BYTES else note(f"{found}, which is little", remedy)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
