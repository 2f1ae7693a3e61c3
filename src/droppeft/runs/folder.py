"""The folder of a run, which is created in one step and locked by the process that works in it.

Ours.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from droppeft.config import Config, to_toml
from droppeft.errors import DroppeftError
from droppeft.files import sync, write_atomically
from droppeft.quantities import counted
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.ledger import SCHEMA_VERSION

CONFIG, ROUNDS, CLIENTS, RESULT = "config.toml", "rounds.jsonl", "clients.jsonl", "result.json"
GENERATED = "generated.jsonl"
LOCK = ".lock"


def new_folder(method: str) -> Path:
    """A folder named by method and time, in milliseconds since a script may start several runs."""
    time = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    return Path("runs") / f"{time}-{method}"


def check_free(out: Path) -> None:
    """Refuse an output folder that is not empty or cannot be created.

    Raises:
        DroppeftError: the folder is not empty or cannot be created.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = f", or go on with its run: droppeft resume {out}" if (out / CONFIG).is_file() else ""
        raise DroppeftError(f"{out} exists already; choose another folder{what}")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise DroppeftError(f"{out}: cannot write in {parent}; choose another folder")


def begin(out: Path, config: Config, first: Checkpoint) -> None:
    """Create the folder of a run with its configuration and first checkpoint, in one step.

    Raises:
        DroppeftError: it cannot be created; nothing is left then.
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
        raise DroppeftError(
            f"{out}: cannot be created ({error.strerror}); choose another folder"
        ) from None


def with_more_rounds(config: Config, rounds: int, out: Path) -> Config:
    """Return a run's configuration with a larger number of rounds.

    Raises:
        DroppeftError: it is no whole number, or the run has as many rounds already.
    """
    if type(rounds) is not int:
        raise DroppeftError(f"rounds={rounds!r}: give a whole number")
    if rounds <= config.rounds:
        raise DroppeftError(
            f"rounds={rounds}: {out} has {counted(config.rounds, 'round')}; give a larger number"
        )
    return config.model_copy(update={"rounds": rounds})


def save_extended(out: Path, config: Config) -> None:
    """Write the configuration of a run that gets more rounds.

    The result of a finished run is kept as ``result-round-N.json``.
    """
    if (out / RESULT).exists():
        earlier = read_result(out)["rounds"]
        (out / RESULT).replace(out / f"result-round-{earlier}.json")
    write_atomically(out / CONFIG, to_toml(config).encode())


def read_result(run: Path) -> dict[str, Any]:
    """The content of a finished run's ``result.json``.

    Raises:
        DroppeftError: another version of droppeft wrote it, in a format that is not read.
    """
    result: dict[str, Any] = json.loads((run / RESULT).read_text(encoding="utf-8"))
    if result.get("schema_version") != SCHEMA_VERSION:
        raise DroppeftError(
            f"{run / RESULT}: was written by another version of droppeft "
            f"(schema_version {result.get('schema_version')}, this one reads {SCHEMA_VERSION}); "
            "use that version, or run the configuration again"
        )
    return result


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a run's folder against other processes; the lock ends with this process at the latest.

    Raises:
        DroppeftError: another process has locked it, or this one cannot write in it.
    """
    try:
        lock = FileLock(out / LOCK, mode=0o600).acquire(blocking=False)
    except Timeout:
        raise DroppeftError(f"{out}: another process is working on this run") from None
    except OSError as error:
        raise DroppeftError(
            f"{out}: cannot be locked ({error.strerror}); make it writable"
        ) from None
    with lock:
        yield
