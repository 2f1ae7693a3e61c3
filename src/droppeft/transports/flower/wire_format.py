"""Pack instructions and replies as JSON text and one safetensors blob; nothing is ever unpickled.

The text follows from the fields and types of the dataclasses, so a new field needs no change here.
Every value of a received message is checked against its declared type, and the message must be
written exactly as this version of droppeft writes it.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.numpy
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from safetensors import SafetensorError

from droppeft.client.published_task import PublishedTask
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Answer, EvaluationReply, Failure, Reply, Update
from droppeft.messages.tensors import Array, LayerKey, Tensors, flatten
from droppeft.refusals import Refused

MOST_HEAD = 1_000_000
"""Largest number of characters of a message's text."""

MOST_TEXT = 1_000
"""Largest number of characters of a string in a message."""


class Malformed(DroppeftError):
    """A message cannot be packed or read.

    The error repeats nothing from the message, which may be hostile.
    """


@dataclass(frozen=True)
class Packed:
    """A packed message.

    Attributes:
        head: JSON text of everything except the arrays.
        tensors: the arrays as a safetensors blob, in which their names are numbers from 0.
    """

    head: str
    tensors: bytes


@dataclass(frozen=True)
class RunContext:
    """What a client process needs, beside the instruction, in order to load data and model.

    Attributes:
        config: nested settings. For sites those of
            :func:`~droppeft.client.site_config.published_settings`; in a simulation, all of the
            resolved configuration.
        task: what the server publishes about the task; ``None`` in a simulation.
        identity: in a simulation, hashes of data, split and backbone.
        model_server: whether a process on the node may keep the model loaded between messages.
    """

    config: Mapping[str, Any]
    task: PublishedTask | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    model_server: bool = False


@dataclass(frozen=True)
class _Refusal:
    """What travels of a :class:`~droppeft.refusals.Refused`."""

    code: str
    numbers: tuple[float, ...] = ()


@with_config(ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True))
@dataclass(frozen=True)
class _Head:
    """What the text of a message holds: an instruction or a reply, whose tensors are left out.

    The dataclasses inside are as strict as this one, because pydantic hands down its configuration.

    Attributes:
        tensors: layers of the message's tensors, and the names of the tensors of each layer.
        base_delta: names of the tensors of the instruction's base delta. The blob holds first
            the message's tensors and then these, in this order.
        failure: a failure with a text, which only a simulation sends.
    """

    tensors: tuple[tuple[LayerKey, tuple[str, ...]], ...] = ()
    base_delta: tuple[str, ...] = ()
    instruction: Instruction | None = None
    run_context: RunContext | None = None
    update: Update | None = None
    evaluation: EvaluationReply | None = None
    refusal: _Refusal | None = None
    failure: Failure | None = None


_HEAD = TypeAdapter(_Head)


def one_line(text: str, most: int = MOST_TEXT) -> str:
    """Make a text from the network printable, and cut it to at most ``most`` characters."""
    line = "".join(char if char.isprintable() else " " for char in text[: most + 1])
    return line if len(line) <= most else line[: most - 1] + "…"


def pack_instruction(instruction: Instruction, run_context: RunContext) -> Packed:
    """Pack an instruction and its run context; equal content in equal order gives equal bytes.

    Raises:
        Malformed: a value has no encoding or would be refused, or the text is too long.
    """
    return _pack("instruction", *_instruction_head(instruction, run_context))


def unpack_instruction(packed: Packed) -> tuple[Instruction, RunContext]:
    """Unpack what :func:`pack_instruction` has packed.

    Raises:
        Malformed: the message is anything else.
    """
    head, arrays = _read(packed.head), _load(packed.tensors)
    if head.instruction is None or head.run_context is None:
        raise Malformed("the message is no instruction")
    layers, named = _joined(head, arrays)
    delta = head.instruction.base_delta
    instruction = dataclasses.replace(
        head.instruction,
        tensors=layers,
        base_delta=delta and dataclasses.replace(delta, tensors=named),
    )
    _check_same(_instruction_head(instruction, head.run_context)[0], packed.head)
    return instruction, head.run_context


def pack_reply(reply: Answer | Refused | Failure) -> Packed:
    """Pack a reply; the reason of a failure becomes one printable line.

    Args:
        reply: a failure only in a simulation, since its reason may hold anything.

    Raises:
        Malformed: a value has no encoding or would be refused, or the text is too long.
    """
    return _pack("reply", *_reply_head(reply))


def unpack_reply(packed: Packed, most_bytes: int, *, simulated: bool = False) -> Reply:
    """Unpack what :func:`pack_reply` has packed; numbers may be NaN, which validation refuses.

    A refusal becomes a failure of client -1, with the sentence of its code.

    Args:
        packed: the received message.
        most_bytes: size above which the blob is refused unread. A blob has the bytes of its
            arrays, at most 200 more for each array of up to four dimensions, and 16.
        simulated: whether a failure may have a text of its own.

    Raises:
        Malformed: the message is anything else, its blob is too large, or a code is unknown.
    """
    if len(packed.tensors) > most_bytes:
        raise Malformed(
            f"the message has {len(packed.tensors)} bytes of tensors, {most_bytes} at most are "
            "expected"
        )
    head, arrays = _read(packed.head), _load(packed.tensors)
    reply = head.update or head.evaluation or head.refusal or (head.failure if simulated else None)
    if reply is None:
        raise Malformed("the message is no update and no evaluation and no refusal")
    layers, _ = _joined(head, arrays)
    if isinstance(reply, Update):
        reply = dataclasses.replace(reply, tensors=layers)
    _check_same(_reply_head(reply)[0], packed.head)
    return _failure_of(reply) if isinstance(reply, _Refusal) else reply


def _failure_of(refusal: _Refusal) -> Failure:
    """The failure with the sentence of a code that came from a client."""
    try:
        return Failure.of(-1, Refused(refusal.code, *refusal.numbers))
    except ValueError as error:
        raise Malformed(str(error)) from None


def _instruction_head(
    instruction: Instruction, run_context: RunContext
) -> tuple[_Head, list[Array]]:
    """Separate an instruction from its arrays, which come in the order of their names."""
    delta = instruction.base_delta
    named = delta.tensors if delta else {}
    bare = dataclasses.replace(
        instruction, tensors={}, base_delta=delta and dataclasses.replace(delta, tensors={})
    )
    names = _names(instruction.tensors)
    head = _Head(names, tuple(named), instruction=bare, run_context=run_context)
    return head, [*_arrays(instruction.tensors), *named.values()]


def _reply_head(reply: Answer | Refused | _Refusal | Failure) -> tuple[_Head, list[Array]]:
    """Separate a reply from its arrays."""
    if isinstance(reply, Update):
        bare = dataclasses.replace(reply, tensors={})
        return _Head(_names(reply.tensors), update=bare), _arrays(reply.tensors)
    if isinstance(reply, EvaluationReply):
        return _Head(evaluation=reply), []
    if isinstance(reply, Refused):
        return _Head(refusal=_Refusal(reply.code, reply.numbers)), []
    if isinstance(reply, _Refusal):
        return _Head(refusal=reply), []
    return _Head(failure=dataclasses.replace(reply, reason=one_line(reply.reason))), []


def _names(tensors: Tensors) -> tuple[tuple[LayerKey, tuple[str, ...]], ...]:
    return tuple((layer, tuple(named)) for layer, named in tensors.items())


def _arrays(tensors: Tensors) -> list[Array]:
    return [array for _, _, array in flatten(tensors)]


def _joined(head: _Head, arrays: dict[str, Array]) -> tuple[Tensors, dict[str, Array]]:
    """The tensors of a message and those of its base delta."""
    count = sum(len(names) for _, names in head.tensors) + len(head.base_delta)
    if arrays.keys() != {str(number) for number in range(count)}:
        raise Malformed(f"the message's blob does not hold the {count} tensors that it should")
    values = (arrays[str(number)] for number in range(count))
    layers = {layer: {name: next(values) for name in names} for layer, names in head.tensors}
    return layers, dict(zip(head.base_delta, values, strict=True))


def _pack(kind: str, head: _Head, arrays: list[Array]) -> Packed:
    try:
        # Reading refuses what a receiver would refuse, and gives all numbers their fields' types.
        text = _text(_read(_text(head)))
        blob: bytes = safetensors.numpy.save(
            {str(number): _contiguous(array) for number, array in enumerate(arrays)}
        )
    except (TypeError, SafetensorError) as error:
        raise Malformed(f"the {kind} cannot be packed: {error}") from None
    return Packed(text, blob)


def _contiguous(array: Array) -> Array:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"an array of type {array.dtype} has no encoding")
    return np.asarray(array, order="C")


def _text(head: _Head) -> str:
    return json.dumps(head, default=_plain, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return vars(value)
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _read(text: str) -> _Head:
    if len(text) > MOST_HEAD:
        raise Malformed(
            f"the message has {len(text)} characters of text, {MOST_HEAD} at most may be sent"
        )
    try:
        head = _HEAD.validate_json(text)
    except ValidationError as error:
        raise Malformed(_first(error)) from None
    _check_values(head)
    return head


def _first(error: ValidationError) -> str:
    """The first error that pydantic found, as one sentence without anything from the message."""
    first = error.errors(include_input=False, include_context=False, include_url=False)[0]
    # The two outermost steps are fields of ours; what stands further inside may be keys of theirs.
    path = first["loc"][: -1 if first["type"] == "unexpected_keyword_argument" else 2][:2]
    place = ".".join(map(str, ("message", *path)))
    problem = first["msg"][:1].lower() + first["msg"][1:]
    return f"{place} is not valid: {problem}; is droppeft the same on both sides?"


def _check_same(head: _Head, text: str) -> None:
    """Refuse a text with repeated keys or items, or without fields that have defaults."""
    if _text(head) != text:
        raise Malformed(
            "the message is not as this version writes it: something is missing, twice, or of "
            "another type; is droppeft the same on both sides?"
        )


def _check_values(value: object) -> None:
    """Refuse long or unprintable strings and integers above 64 bits, at any depth.

    The configuration may hold any values; the client checks them when it reads it.
    """
    if isinstance(value, str):
        if len(value) > MOST_TEXT or not value.isprintable():
            raise Malformed("the message has a string that is too long or not printable")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise Malformed("the message has an integer of more than 64 bits")
    elif isinstance(value, RunContext):
        _check_values((value.identity, value.task))
    elif dataclasses.is_dataclass(value):
        _check_values(vars(value))
    elif isinstance(value, Mapping):
        _check_values((*value, *value.values()))
    elif isinstance(value, tuple | frozenset):
        for item in value:
            _check_values(item)


def _load(blob: bytes) -> dict[str, Array]:
    try:
        arrays: dict[str, Array] = safetensors.numpy.load(blob)
    except KeyError as error:
        raise Malformed(f"the message has tensors of a type unknown to numpy: {error}") from None
    except (SafetensorError, ValueError):
        raise Malformed("the message's tensors are not a complete safetensors blob") from None
    return arrays
