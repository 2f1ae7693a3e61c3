"""The folder of a run: made in one step with all it needs to be resumed, and held by one process.

Ours.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from droppeft.config import Config, to_toml
from droppeft.errors import DroppeftError
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.files import sync, write_atomically

CONFIG, ROUNDS, CLIENTS, RESULT = "config.toml", "rounds.jsonl", "clients.jsonl", "result.json"


def check_free(out: Path) -> None:
    """Refuse an output folder that has content or cannot be made.

    Raises:
        DroppeftError: with what to do.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DroppeftError(
            f"--out {out} exists already; choose another folder, "
            f"or go on with: droppeft resume {out}"
        )
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise DroppeftError(f"--out {out}: cannot write in {parent}; choose another folder")


def begin(out: Path, config: Config, first: Checkpoint) -> None:
    """Make the folder of a run that can be resumed, or nothing.

    Raises:
        DroppeftError: it cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            inside = Path(scratch) / "run"
            inside.mkdir()
            write_atomically(inside / CONFIG, to_toml(config).encode())
            checkpoints.save(inside / "checkpoints", first)
            inside.replace(out)
        sync(out.parent)
    except OSError as error:
        raise DroppeftError(f"--out {out}: cannot be made ({error.strerror})") from None


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep a second process out of the folder; the lock goes with the process.

    Raises:
        DroppeftError: another process has it.
    """
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DroppeftError(f"{out}: another process is working on this run") from None
        yield
    finally:
        os.close(handle)
