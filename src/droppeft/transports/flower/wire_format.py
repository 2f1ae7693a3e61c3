"""instructions and Replies as JSON text and one safetensors blob, and back; nothing is ever
unpickled.

The text follows the fields and types of the dataclasses themselves: a message that gains a field
needs no line here. What comes in is taken for hostile until every value has its declared type.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from droppeft.messages import Array, Failure, Instruction, Measurement, Reply, Update
from droppeft.transports.flower.strict_json import Malformed, Place, decode, encode, one_line

MOST_HEAD = 1_000_000
"""Characters of the longest head."""


_KINDS: dict[type[Reply], str] = {
    Update: "update",
    Measurement: "measurement",
    Failure: "failure",
}


@dataclass(frozen=True)
class Packed:
    """A message as it travels.

    Attributes:
        head: JSON text of everything but the arrays, which it calls by number.
        tensors: the arrays, a safetensors blob with numbers for names.
    """

    head: str
    tensors: bytes


@dataclass(frozen=True)
class RunContext:
    """What a client is told besides its instruction, so that it needs no configuration of its own.

    Attributes:
        config: the run's resolved configuration, the tree of ``config.as_tree``.
        identity: hashes of the texts, split and backbone that the client must find.
        model_server: whether a process beside the client may keep the model for the next message.
    """

    config: Mapping[str, Any]
    identity: Mapping[str, str]
    model_server: bool


@dataclass(frozen=True)
class _Message:
    instruction: Instruction
    run_context: RunContext


def pack_instruction(instruction: Instruction, run_context: RunContext) -> Packed:
    """Pack what a client is sent; equal content in equal order gives equal bytes.

    Raises:
        Malformed: it holds what cannot travel, or its text is too long.
    """
    return _pack("task", _Message(instruction, run_context))


def unpack_instruction(packed: Packed) -> tuple[Instruction, RunContext]:
    """Read what :func:`pack_instruction` made.

    Raises:
        Malformed: it is anything else.
    """
    task: _Message = _unpack(packed, {"task": _Message})
    return task.instruction, task.run_context


def pack_reply(reply: Reply) -> Packed:
    """Pack what a client answers; the reason of a Failure is made one line.

    Raises:
        Malformed: it holds what cannot travel, or its text is too long.
    """
    if isinstance(reply, Failure):
        return _pack("failure", dataclasses.replace(reply, reason=one_line(reply.reason)))
    return _pack(_KINDS[type(reply)], reply)


def unpack_reply(packed: Packed, most_bytes: int) -> Reply:
    """Read what :func:`pack_reply` made. Its numbers are not judged here: they may be NaN.

    Args:
        packed: what came.
        most_bytes: of the blob, which is refused unread beyond that. It has the arrays' bytes, at
            most 200 more for each array of up to four dimensions, and 16.

    Raises:
        Malformed: it is anything else, or larger.
    """
    if len(packed.tensors) > most_bytes:
        raise Malformed(
            f"the message has {len(packed.tensors)} bytes of tensors, {most_bytes} at most are due"
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
        raise Malformed(f"the message has {len(place.arrays)} tensors that it does not speak of")
    return message


def _check_length(head: str) -> None:
    if len(head) > MOST_HEAD:
        raise Malformed(
            f"the message has {len(head)} characters of text, {MOST_HEAD} at most may travel"
        )


def _parse(head: str) -> dict[str, Any]:
    _check_length(head)
    try:
        tree = json.loads(head, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        raise Malformed("the message's text is not JSON, or names something twice") from None
    if not isinstance(tree, dict):
        raise Malformed("the message's text is not a JSON object")
    return tree


def _without_repeats(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _load(blob: bytes) -> dict[str, Array]:
    try:
        arrays: dict[str, Array] = safetensors.numpy.load(blob)
    except KeyError as error:
        raise Malformed(f"the message has tensors of a type unknown to numpy: {error}") from None
    except (SafetensorError, ValueError):
        raise Malformed("the message's tensors are not a whole safetensors blob") from None
    return arrays
