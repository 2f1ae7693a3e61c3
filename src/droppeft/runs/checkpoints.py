"""Checkpoints of the server's state: a file per round, of which a few stay.

A file is written atomically and carries a checksum.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from droppeft.checked_safetensors import DAMAGES, decode_checked, encode_checked
from droppeft.errors import DroppeftError
from droppeft.files import write_atomically
from droppeft.messages.instruction import AdapterSpec, BaseDelta
from droppeft.messages.server_state import GlobalModel, ServerState
from droppeft.messages.tensors import Array, LayerKey, flatten, layer_key
from droppeft.runs.method_memory import decode_memory, encode_memory

KEPT = 2
"""Number of newest checkpoints that stay in the folder."""

_SEPARATOR = "|"
_ADAPTER_SPEC = TypeAdapter(AdapterSpec)
_log = logging.getLogger("droppeft")


CheckFacts = Callable[[Mapping[str, Any]], None]
"""Raises a DroppeftError if a checkpoint with these facts must not be used."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to be resumed.

    Attributes:
        round: the last complete round; 0 before the first.
        state: the server's state after that round.
        facts: what was measured once, before round 1; JSON values.
    """

    round: int
    state: ServerState
    facts: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: Collection[int] = ()) -> Path:
    """Write a checkpoint, and delete all but the last two and those of the rounds ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, checkpoint.round)
    write_atomically(path, _encode(checkpoint))
    kept = {_path(folder, round) for round in keep}
    for old in _newest_first(folder)[KEPT:]:
        if old not in kept:
            old.unlink()
    return path


def load_newest(
    folder: Path, memory_type: type, check_facts: CheckFacts = lambda facts: None
) -> Checkpoint:
    """Read the newest checkpoint that is not damaged.

    Args:
        folder: of the checkpoints.
        memory_type: ``memory_type`` of the run's method.
        check_facts: is called before the memory is read.

    Raises:
        DroppeftError: there is none, its memory is that of another method, or as ``check_facts``.
    """
    for path in _newest_first(folder):
        try:
            checkpoint = _decode(path)
        except DAMAGES as error:
            _log.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
        else:
            check_facts(checkpoint.facts)
            return _with_decoded_memory(path, checkpoint, memory_type)
    raise DroppeftError(f"{folder}: holds no readable checkpoint; start a new run")


def load_round(
    folder: Path, round: int, memory_type: type, check_facts: CheckFacts = lambda facts: None
) -> Checkpoint:
    """Read the checkpoint of one round.

    Args:
        folder: of the checkpoints.
        round: whose checkpoint to read.
        memory_type, check_facts: as in :func:`load_newest`.

    Raises:
        DroppeftError: there is no such checkpoint, it is damaged, its memory is that of another
            method, or as ``check_facts``.
    """
    path = _path(folder, round)
    if not path.exists():
        saved = [str(int(path.stem.removeprefix("round-"))) for path in _newest_first(folder)]
        raise DroppeftError(
            f"{folder}: holds no round {round}; the saved rounds are: {', '.join(saved) or 'none'}"
        )
    try:
        checkpoint = _decode(path)
    except DAMAGES as error:
        raise DroppeftError(f"{path}: is damaged ({error}); choose another round") from None
    check_facts(checkpoint.facts)
    return _with_decoded_memory(path, checkpoint, memory_type)


def remove_after(folder: Path, round: int) -> None:
    """Delete the checkpoints of later rounds, to which a run shall not return."""
    for path in _newest_first(folder):
        if path > _path(folder, round):
            path.unlink()


def _path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:05d}.safetensors"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.safetensors"), reverse=True)


def _encode(checkpoint: Checkpoint) -> bytes:
    state = checkpoint.state
    models = {"": state.model, **state.alternatives}
    arrays = {
        label: array for name, model in models.items() for label, array in _labelled(name, model)
    }
    head = {
        "round": checkpoint.round,
        "facts": checkpoint.facts,
        "memory": encode_memory(state.memory),
        "agreement": {str(client): value for client, value in state.agreement.items()},
        "models": {name: _describe(model) for name, model in models.items()},
    }
    return encode_checked(arrays, head)


def _decode(path: Path) -> Checkpoint:
    """Read a checkpoint; its memory still consists of plain JSON values."""
    arrays, head = decode_checked(path)
    models = {
        name: _assemble(name, description, arrays) for name, description in head["models"].items()
    }
    agreement = {int(client): value for client, value in head["agreement"].items()}
    state = ServerState(models.pop(""), models, head["memory"], agreement)
    return Checkpoint(head["round"], state, head["facts"])


def _with_decoded_memory(path: Path, checkpoint: Checkpoint, kind: type) -> Checkpoint:
    try:
        memory = decode_memory(checkpoint.state.memory, kind)
    except DroppeftError as error:
        raise DroppeftError(f"{path}: {error}") from None
    return replace(checkpoint, state=replace(checkpoint.state, memory=memory))


def _labelled(name: str, model: GlobalModel) -> Iterator[tuple[str, Array]]:
    """Yield a model's arrays, each with a unique label from which its place can be read."""
    for key, tensor, array in flatten(model.tensors):
        yield _SEPARATOR.join((name, "adapter", str(key), tensor)), array
    if model.base_delta is not None:
        for tensor, array in model.base_delta.tensors.items():
            yield _SEPARATOR.join((name, "base", "", tensor)), array


def _describe(model: GlobalModel) -> dict[str, Any]:
    delta = model.base_delta
    return {
        "adapter": dataclasses.asdict(model.adapter),
        "base_delta_version": None if delta is None else delta.version,
    }


def _assemble(name: str, description: dict[str, Any], arrays: Mapping[str, Array]) -> GlobalModel:
    tensors: dict[LayerKey, dict[str, Array]] = {}
    base: dict[str, Array] = {}
    for label, array in arrays.items():
        model, kind, key, tensor = label.split(_SEPARATOR, 3)
        if model == name and kind == "adapter":
            tensors.setdefault(layer_key(key), {})[tensor] = array
        elif model == name:
            base[tensor] = array
    version = description["base_delta_version"]
    return GlobalModel(
        _ADAPTER_SPEC.validate_python(description["adapter"]),
        tensors,
        None if version is None else BaseDelta(version, base),
    )
