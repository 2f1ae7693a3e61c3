"""The client state: tensors that a client saves for its next local training and never sends.

There is one file, with a checksum, for each local training. The server says which file the next
local training begins with (:attr:`Instruction.state_round`), because only the server knows which
updates were merged. After a lost reply, or if the run resumes from an older checkpoint, the client
thus continues from the state that the server assumes.

Ours.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_state_path

from droppeft.checked_safetensors import DAMAGES, decode_checked, encode_checked
from droppeft.errors import DroppeftError
from droppeft.files import make_private, remove_left_behind, sync, write_atomically
from droppeft.messages.instruction import checked_run
from droppeft.messages.tensors import Array, LayerKey, Tensors, flatten, layer_key
from droppeft.refusals import STATE_LOST, Refused

MERGED_FILES = 2
"""How many files of merged local trainings are retained, so that the server can resume from its
older checkpoint."""

ROUND = "round"
"""Kind of the files with what a local training saved."""

_log = logging.getLogger("droppeft")


def state_dir() -> Path:
    """Return ``$DROPPEFT_STATE``, or else ``droppeft`` in the platform's folder for states.

    That is ``$XDG_STATE_HOME`` or ``~/.local/state`` on Linux. Saved states cannot be computed
    again, so droppeft never deletes the folder of a run.

    Raises:
        DroppeftError: ``$DROPPEFT_STATE`` is a relative path, whose meaning would depend on the
            working directory.
    """
    path = Path(os.environ.get("DROPPEFT_STATE") or user_state_path("droppeft"))
    if not path.is_absolute():
        raise DroppeftError(f"DROPPEFT_STATE={path} is not an absolute path; write it in full")
    return path


def client_folder(run: str, client: int) -> Path:
    """Return the folder of one client's state, which does not depend on the run's own folder.

    Raises:
        DroppeftError: the name of the run, which the server sent, is not valid.
    """
    return state_dir() / checked_run(run) / f"client-{client:06}"


@dataclass(frozen=True)
class Saved:
    """What a local training saved.

    Attributes:
        tensors: the tensors.
        chosen: names of those that belong to layers which the client chose to keep.
    """

    tensors: Tensors
    chosen: frozenset[str] = frozenset()


def save_tensors(
    folder: Path,
    round: int,
    before: int | None,
    tensors: Tensors,
    chosen: Collection[str] = (),
) -> None:
    """Save the tensors of a local training, and delete older files that are no longer needed.

    Args:
        folder: folder of the client; created if it does not exist.
        round: round of the local training.
        before: :attr:`Instruction.state_round` of the same instruction.
        tensors: the tensors to save.
        chosen: see :class:`Saved`.

    Raises:
        DroppeftError: the file cannot be written.
    """
    arrays = {f"{key}|{name}": array for key, name, array in flatten(tensors)}
    try:
        _make(folder)
        head = {"round": round, "of": _owner(folder), "chosen": sorted(chosen)}
        write_atomically(
            round_file(folder, ROUND, round), encode_checked(arrays, head), private=True
        )
        saved = sorted(saved_rounds(folder, ROUND))
        merged = [other for other in saved if before is not None and other <= before]
        # Files of later rounds stay, because this local training may be the one that is late.
        for other in {other for other in saved if other < round} - {*merged[-MERGED_FILES:]}:
            round_file(folder, ROUND, other).unlink(missing_ok=True)
    except OSError as error:
        raise DroppeftError(
            f"{folder}: this client's tensors cannot be saved ({error}); "
            "check the disk, or set DROPPEFT_STATE to another folder"
        ) from None


def load_tensors(folder: Path, round: int) -> Tensors:
    """Load the tensors that the local training of a round saved; see :func:`load_saved`."""
    return load_saved(folder, round).tensors


def load_saved(folder: Path, round: int) -> Saved:
    """Load what the local training of a round saved.

    Raises:
        Refused: with the code ``state_lost``: the file is missing or damaged, or belongs to another
            round, client or run.
        DroppeftError: the file exists but cannot be read at the moment.
    """
    path = round_file(folder, ROUND, round)
    try:
        arrays, head = decode_checked(path)
        if (head["round"], head["of"]) != (round, _owner(folder)):
            raise ValueError(f"it is of round {head['round']} of {head['of']}")
    except DAMAGES as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise DroppeftError(f"{path} cannot be read ({error}); check its permissions") from None
        problem = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        _log.warning("%s is %s (%s)", path, problem, error)
        raise Refused(STATE_LOST, round) from None
    tensors: dict[LayerKey, dict[str, Array]] = {}
    for label, array in arrays.items():
        key, name = label.split("|", 1)
        tensors.setdefault(layer_key(key), {})[name] = array
    return Saved(tensors, frozenset(head["chosen"]))


def bytes_of_client(client: int) -> int:
    """Return the bytes of all that a client has saved, in all runs."""
    return sum(
        path.stat().st_size for path in state_dir().glob(f"*/client-{client:06}/*.safetensors")
    )


def _make(folder: Path) -> None:
    """Create a client's folder durably, and delete temporary files that killed processes left."""
    is_new = not folder.is_dir()
    make_private(folder)
    if is_new:
        for above in (folder.parent, folder.parent.parent):
            sync(above)
    remove_left_behind(folder, "round-*")


def _owner(folder: Path) -> str:
    """Return the names of run and client."""
    return f"{folder.parent.name}/{folder.name}"


def round_file(folder: Path, kind: str, round: int) -> Path:
    """Return a client's file of a kind for a round."""
    return folder / f"{kind}-{round:06}.safetensors"


def saved_rounds(folder: Path, kind: str) -> Iterator[int]:
    """Yield the rounds for which a client's folder has a file of a kind; none without a folder."""
    name = re.compile(rf"{kind}-(\d{{6}})\.safetensors")
    for path in folder.iterdir() if folder.is_dir() else ():
        match = name.fullmatch(path.name)
        if match:
            yield int(match[1])
