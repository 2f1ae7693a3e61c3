"""Pack instructions and replies as JSON text and one safetensors blob; nothing is ever unpickled.

The text follows from the fields and types of the dataclasses, so a new field needs no change here.
Every value of a received message is checked against its declared type.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from droppeft.messages import Array, EvaluationReply, Failure, Instruction, Reply, Update
from droppeft.transports.flower.strict_json import Malformed, Place, decode, encode, one_line

MOST_HEAD = 1_000_000
"""Largest number of characters of a message's text."""


_KINDS: dict[type[Reply], str] = {
    Update: "update",
    EvaluationReply: "evaluation",
    Failure: "failure",
}


@dataclass(frozen=True)
class Packed:
    """A packed message.

    Attributes:
        head: JSON text of everything except the arrays, to which it refers by number.
        tensors: the arrays as a safetensors blob, in which numbers are their names.
    """

    head: str
    tensors: bytes


@dataclass(frozen=True)
class RunContext:
    """What a client process needs, beside the instruction, in order to load data and model.

    Attributes:
        config: the run's resolved configuration, as made by ``config.as_tree``.
        identity: hashes of data, split and backbone, which the client's copies must have.
        model_server: whether a process on the node may keep the model loaded between messages.
    """

    config: Mapping[str, Any]
    identity: Mapping[str, str]
    model_server: bool


@dataclass(frozen=True)
class _Task:
    """What a client is sent."""

    instruction: Instruction
    run_context: RunContext


def pack_instruction(instruction: Instruction, run_context: RunContext) -> Packed:
    """Pack an instruction and its run context; equal content in equal order gives equal bytes.

    Raises:
        Malformed: a value has no encoding, or the text is too long.
    """
    return _pack("task", _Task(instruction, run_context))


def unpack_instruction(packed: Packed) -> tuple[Instruction, RunContext]:
    """Unpack what :func:`pack_instruction` has packed.

    Raises:
        Malformed: the message is anything else.
    """
    task: _Task = _unpack(packed, {"task": _Task})
    return task.instruction, task.run_context


def pack_reply(reply: Reply) -> Packed:
    """Pack a reply; the reason of a failure becomes one printable line.

    Raises:
        Malformed: a value has no encoding, or the text is too long.
    """
    if isinstance(reply, Failure):
        return _pack("failure", dataclasses.replace(reply, reason=one_line(reply.reason)))
    return _pack(_KINDS[type(reply)], reply)


def unpack_reply(packed: Packed, most_bytes: int) -> Reply:
    """Unpack what :func:`pack_reply` has packed; numbers may be NaN, which validation refuses.

    Args:
        packed: the received message.
        most_bytes: size above which the blob is refused unread. A blob has the bytes of its
            arrays, at most 200 more for each array of up to four dimensions, and 16.

    Raises:
        Malformed: the message is anything else, or its blob is too large.
    """
    if len(packed.tensors) > most_bytes:
        raise Malformed(
            f"the message has {len(packed.tensors)} bytes of tensors, {most_bytes} at most are "
            "expected"
        )
    reply: Reply = _unpack(packed, {name: kind for kind, name in _KINDS.items()})
    return reply


def _pack(kind: str, message: object) -> Packed:
    arrays: dict[str, Array] = {}
    try:
        head = json.dumps({kind: encode(message, arrays)}, separators=(",", ":"))
        blob: bytes = safetensors.numpy.save(arrays)
    except (TypeError, SafetensorError) as error:
        raise Malformed(f"the {kind} cannot be packed: {error}") from None
    _check_length(head)
    return Packed(head, blob)


def _unpack(packed: Packed, kinds: Mapping[str, type]) -> Any:
    head = _parse(packed.head)
    if len(head) != 1 or not head.keys() <= kinds.keys():
        raise Malformed(f"the message is no {' and no '.join(kinds)}")
    [(kind, tree)] = head.items()
    place = Place(kind, _load(packed.tensors))
    message = decode(kinds[kind], tree, place)
    if place.arrays:
        raise Malformed(f"the message has {len(place.arrays)} tensors that its text does not use")
    return message


def _check_length(head: str) -> None:
    if len(head) > MOST_HEAD:
        raise Malformed(
            f"the message has {len(head)} characters of text, {MOST_HEAD} at most may be sent"
        )


def _parse(head: str) -> dict[str, Any]:
    _check_length(head)
    try:
        tree = json.loads(head, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        raise Malformed("the message's text is not JSON, or has a key twice") from None
    if not isinstance(tree, dict):
        raise Malformed("the message's text is not a JSON object")
    return tree


def _without_repeats(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _load(blob: bytes) -> dict[str, Array]:
    try:
        arrays: dict[str, Array] = safetensors.numpy.load(blob)
    except KeyError as error:
        raise Malformed(f"the message has tensors of a type unknown to numpy: {error}") from None
    except (SafetensorError, ValueError):
        raise Malformed("the message's tensors are not a complete safetensors blob") from None
    return arrays
