"""What a client saves for its next local training and sends to nobody: files with checksums; ours.

There is one file for each local training. The server says with which one the next begins
(:attr:`Instruction.state_round`), because only the server knows which updates were merged: after a
lost reply, or when the run goes on from an older checkpoint, the client begins again where the
server believes it to be.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from droppeft.checked_safetensors import DAMAGES, decode_checked, encode_checked
from droppeft.errors import DroppeftError
from droppeft.files import sync, write_atomically
from droppeft.messages import Array, LayerKey, Tensors, checked_run, flatten, layer_key

EARLIER = 2
"""Files that stay of the turns that count, so that a server can go back to its older checkpoint."""

LEFT_BEHIND_S = 3600.0
"""Age at which a file that was never renamed belongs to a process that was killed."""

_NAME = re.compile(r"round-(\d{6})\.safetensors")
_log = logging.getLogger("droppeft")


class StateLost(DroppeftError):
    """A client no longer has what it kept; it gets everything at its next turn."""


def state_dir() -> Path:
    """``$DROPPEFT_STATE``, else ``droppeft`` in ``$XDG_STATE_HOME`` or ``~/.local/state``.

    What is there cannot be made again, and nothing here deletes a run's.

    Raises:
        DroppeftError: the first is no absolute path, and would be another folder tomorrow.
    """
    if own := os.environ.get("DROPPEFT_STATE"):
        if not Path(own).is_absolute():
            raise DroppeftError(f"DROPPEFT_STATE={own} is not an absolute path; write it in full")
        return Path(own)
    shared = Path(os.environ.get("XDG_STATE_HOME") or "")
    return (shared if shared.is_absolute() else Path.home() / ".local" / "state") / "droppeft"


def client_folder(run: str, client: int) -> Path:
    """Where one client keeps what is its own; a run's copy in another folder has the same.

    Raises:
        DroppeftError: the name of the run is none; it comes from a server.
    """
    return state_dir() / checked_run(run) / f"client-{client:06}"


def save_tensors(folder: Path, round: int, before: int | None, tensors: Tensors) -> None:
    """Write what a turn has made; older files than can be asked for again go.

    Args:
        folder: of the client; made when it is not there.
        round: of the turn.
        before: :attr:`Instruction.state_round` of the same turn.
        tensors: to be kept.

    Raises:
        DroppeftError: the disk does not take it.
    """
    arrays = {f"{key}|{name}": array for key, name, array in flatten(tensors)}
    try:
        _make(folder)
        head = {"round": round, "of": _owner(folder)}
        write_atomically(_path(folder, round), encode_checked(arrays, head), private=True)
        counted = [one for one in sorted(_rounds(folder)) if before is not None and one <= before]
        # Not those of later rounds: this turn may be the one that is late.
        for one in {one for one in _rounds(folder) if one < round} - {*counted[-EARLIER:]}:
            _path(folder, one).unlink(missing_ok=True)
    except OSError as error:
        raise DroppeftError(f"{folder}: cannot keep this client's tensors ({error})") from None


def load_tensors(folder: Path, round: int) -> Tensors:
    """Read what the turn of a round has made.

    Raises:
        StateLost: it is not there, or damaged, or is another turn's.
        DroppeftError: it cannot be read now, and perhaps later.
    """
    path = _path(folder, round)
    try:
        arrays, head = decode_checked(path)
        if (head["round"], head["of"]) != (round, _owner(folder)):
            raise ValueError(f"it is of round {head['round']} of {head['of']}")
    except DAMAGES as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise DroppeftError(f"{path} cannot be read ({error})") from None
        why = "is gone" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        _log.warning("%s %s", path, why)
        raise StateLost(f"what it kept in round {round} {why.partition(' (')[0]}") from None
    tensors: dict[LayerKey, dict[str, Array]] = {}
    for label, array in arrays.items():
        key, name = label.split("|", 1)
        tensors.setdefault(layer_key(key), {})[name] = array
    return tensors


def _make(folder: Path) -> None:
    """Make a client's folder to last, and rid it of what killed processes left."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for above in (folder.parent, folder.parent.parent):
            sync(above)
    for path in folder.glob(".round-*"):
        with contextlib.suppress(FileNotFoundError):  # another process may be at it
            if time.time() - path.stat().st_mtime > LEFT_BEHIND_S:
                path.unlink()


def _owner(folder: Path) -> str:
    """Run and client."""
    return f"{folder.parent.name}/{folder.name}"


def _path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:06}.safetensors"


def _rounds(folder: Path) -> Iterator[int]:
    for path in folder.iterdir():
        found = _NAME.fullmatch(path.name)
        if found:
            yield int(found[1])
