"""The folder of a run, which is created in one step and locked by the process that works in it.

Ours.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from droppeft.config import Config, as_tree, flat, load_config, to_toml
from droppeft.errors import DroppeftError
from droppeft.files import remove_left_behind, sync, write_atomically
from droppeft.quantities import counted
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.ledger import SCHEMA_VERSION

CONFIG, ROUNDS, CLIENTS, RESULT = "config.toml", "rounds.jsonl", "clients.jsonl", "result.json"
GENERATED, MISTAKES, PAGE = "generated.jsonl", "mistakes.jsonl", "report.html"
LOCK = ".lock"

LOCK_WAIT_S = 0.3
"""Seconds for which a run waits for its lock, since `is_locked` holds it for a moment."""

FREE_SETTINGS = ("data", "model", "start_from", "tracker", "transport", "workers", "flower.")
"""Settings that may change before a run is resumed, since they cannot change its result: texts and
weights are compared by their hashes, wherever they are. A table ends with a point."""

SETTINGS = "settings"
"""Name of the settings among the facts of a checkpoint."""


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
        remove_left_behind(out.parent, f"{out.name}.*")
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


def bound_settings(config: Config) -> dict[str, Any]:
    """The settings that each checkpoint stores, since its run must not change them."""
    settings = flat(as_tree(config)).items()
    return {key: value for key, value in settings if not _is_free(key)}


def _is_free(key: str) -> bool:
    tables = tuple(name for name in FREE_SETTINGS if name.endswith("."))
    return key in FREE_SETTINGS or key.startswith(tables)


def check_same_settings(out: Path, config: Config, facts: Mapping[str, Any]) -> None:
    """Check that the configuration in a run's folder is the one that its checkpoint belongs to.

    The number of rounds may have grown, as by ``droppeft resume RUN rounds=N``.

    Args:
        out: folder of the run.
        config: as it was read from the folder.
        facts: of the checkpoint.

    Raises:
        DroppeftError: a setting has changed; the message names all that have.
    """
    then, now = facts[SETTINGS], bound_settings(config)
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if config.rounds > then["rounds"]:
        changed.remove("rounds")
    if changed:
        named = ", ".join(
            f"{key}={_written(now.get(key))} (was {_written(then.get(key))})" for key in changed
        )
        raise DroppeftError(
            f"{out / CONFIG}: has other settings than the run was started with: {named}; put them "
            "back, or start a new run"
        )


def _written(value: object) -> str:
    return "none" if value is None else json.dumps(value)


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


def check_holds_run(out: Path) -> None:
    """Refuse a folder in which there is nothing to resume.

    Raises:
        DroppeftError: the folder holds no run.
    """
    if not (out / CONFIG).is_file():
        raise DroppeftError(f"{out}: holds no run to resume (no {CONFIG})")


def saved_config(run: Path) -> Config:
    """Return the configuration of a run.

    Raises:
        DroppeftError: the folder holds no run.
    """
    if not (run / CONFIG).is_file():
        raise DroppeftError(f"{run}: holds no run (no {CONFIG})")
    return load_config(run / CONFIG)


def read_result(run: Path) -> dict[str, Any]:
    """The content of a finished run's ``result.json``.

    Reading a value that the file lacks also raises the error.

    Raises:
        DroppeftError: it cannot be read, or another version of droppeft wrote it, in a format that
            is not read.
    """
    path = run / RESULT
    what_now = f"remove it, and write it again with: droppeft resume {run}"
    try:
        result = json.loads(
            path.read_text(encoding="utf-8"), object_hook=lambda values: _Known(values, path)
        )
    except (OSError, ValueError) as error:
        raise DroppeftError(f"{path}: cannot be read ({error}); {what_now}") from None
    if not isinstance(result, _Known):
        raise DroppeftError(f"{path}: is no JSON object; {what_now}")
    if result["schema_version"] != SCHEMA_VERSION:
        raise DroppeftError(
            f"{path}: was written by another version of droppeft "
            f"(schema_version {result['schema_version']}, this one reads {SCHEMA_VERSION}); "
            "use that version, or run the configuration again"
        )
    return result


class _Known(dict[str, Any]):
    """An object of a JSON file; reading a value that it lacks is an error of the user's file."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__(values)
        self._path = path

    def __missing__(self, name: str) -> None:
        raise DroppeftError(
            f"{self._path}: lacks {name}; remove it, and write it again with: "
            f"droppeft resume {self._path.parent}"
        )


def remove_temporary_files(out: Path) -> None:
    """Delete what a killed process left of files that it was writing; the run must be locked."""
    for name in (CONFIG, ROUNDS, CLIENTS, RESULT, GENERATED, MISTAKES, PAGE):
        remove_left_behind(out, f"{name}.*", older_than_s=0.0)
    remove_left_behind(out / "checkpoints", "*", older_than_s=0.0)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a run's folder against other processes; the lock ends with this process at the latest.

    Raises:
        DroppeftError: another process has locked it, or this one cannot write in it.
    """
    try:
        lock = FileLock(out / LOCK, mode=0o600).acquire(timeout=LOCK_WAIT_S, poll_interval=0.02)
    except Timeout:
        raise DroppeftError(f"{out}: another process is working on this run") from None
    except OSError as error:
        raise DroppeftError(
            f"{out}: cannot be locked ({error.strerror}); make it writable"
        ) from None
    with lock:
        yield


def is_locked(out: Path) -> bool | None:
    """Whether a process is working on a run; ``None`` if its lock belongs to another user."""
    if not (out / LOCK).exists():
        return False
    try:
        with FileLock(out / LOCK, mode=0o600).acquire(blocking=False):
            return False
    except Timeout:
        return True
    except OSError:
        return None
