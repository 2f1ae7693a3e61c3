"""What rounding a client's updates has lost, which it adds to its next update. Ours.

Error feedback is from Seide et al. (Interspeech 2014) and Karimireddy et al. (arXiv:1901.09847).
There is one file for each local training, so that a round that is repeated after a crash begins
with the same errors.
"""

import logging
from collections.abc import Mapping

import numpy as np

from droppeft.checked_safetensors import DAMAGES, decode_checked, encode_checked
from droppeft.client.client_state import client_folder, round_file, saved_rounds, state_dir
from droppeft.errors import DroppeftError
from droppeft.files import make_private, remove_empty, remove_left_behind, write_atomically
from droppeft.messages.encoding import Floats, decode, encode
from droppeft.messages.instruction import Instruction, checked_run
from droppeft.messages.tensors import Array, LayerKey, Tensors, flatten

RETAINED_FILES = 3
"""Files that are retained, so that the server can resume from an older checkpoint."""

_ROUNDING = "rounding"
_log = logging.getLogger("droppeft")

Errors = Mapping[str, Floats]
"""Rounding errors by the name of the tensor, float32."""


def encoded_update(
    instruction: Instruction, trained: Tensors, errors: Errors
) -> tuple[Tensors, Errors]:
    """Encode the tensors of an update as the instruction says.

    A tensor that the instruction brought travels as its change; the server adds it to its own
    value, which is not rounded. Any other tensor travels as its value, without error feedback.
    Errors that are not finite, of a training that diverged, are forgotten.

    Args:
        instruction: as the client received it, decoded.
        trained: the values to send.
        errors: of the client's last update.

    Returns:
        The encoded tensors, and the errors for the next update, also those of tensors that are
        not in this one.
    """
    received = {name: _floats(array) for _, name, array in flatten(instruction.tensors)}
    encoded: dict[LayerKey, dict[str, Array]] = {}
    lost = dict(errors)
    for key, name, array in flatten(trained):
        change = _floats(array)
        if name in received:
            change = change - received[name]
            if name in errors and errors[name].shape == change.shape:
                change = change + errors[name]
        sent = encode(change, instruction.encoding)
        encoded.setdefault(key, {})[name] = sent
        if name in received:
            with np.errstate(over="ignore", invalid="ignore"):
                lost[name] = change - decode(sent, instruction.encoding, change.shape)
    return encoded, {name: error for name, error in lost.items() if np.isfinite(error).all()}


def load_errors(run: str, client: int, round: int) -> Errors:
    """Load the errors of a client's last update before a round; empty if there are none."""
    folder = client_folder(run, client)
    earlier = [other for other in saved_rounds(folder, _ROUNDING) if other < round]
    if not earlier:
        return {}
    path = round_file(folder, _ROUNDING, max(earlier))
    try:
        arrays, _ = decode_checked(path)
        return {name: _floats(array) for name, array in arrays.items()}
    except DAMAGES as error:
        _log.warning("%s cannot be read (%s); rounding begins without it", path, error)
        return {}


def save_errors(run: str, client: int, round: int, errors: Errors) -> None:
    """Save the errors of an update, and delete those that are no longer needed.

    Raises:
        DroppeftError: the file cannot be written.
    """
    folder = client_folder(run, client)
    try:
        make_private(folder)
        remove_left_behind(folder, f"{_ROUNDING}-*")
        write_atomically(
            round_file(folder, _ROUNDING, round), encode_checked(errors, {}), private=True
        )
        for other in sorted(saved_rounds(folder, _ROUNDING))[:-RETAINED_FILES]:
            if other < round:
                round_file(folder, _ROUNDING, other).unlink(missing_ok=True)
    except OSError as error:
        raise DroppeftError(
            f"{folder}: the rounding errors of an update cannot be saved ({error}); check the "
            "disk, set DROPPEFT_STATE to another folder, or traffic.encoding=fp32"
        ) from None


def forget_errors(run: str) -> None:
    """Delete the errors of all clients of a run on this machine.

    They are part of no model. If a finished run is given more rounds, its clients begin without
    them, which loses as much as one rounding.
    """
    for folder in state_dir().glob(f"{checked_run(run)}/client-*"):
        for round in [*saved_rounds(folder, _ROUNDING)]:
            round_file(folder, _ROUNDING, round).unlink(missing_ok=True)
        remove_empty(folder)
    remove_empty(state_dir() / run)


def _floats(array: Array) -> Floats:
    return np.asarray(array, dtype=np.float32)
