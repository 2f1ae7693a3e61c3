"""Packed messages as Flower's records and back, and Flower's errors as sentences.

What Flower does with records is read from flwr 1.41 (``flwr.app.message``,
``flwr.supercore.inflatable``).
"""

import re
from itertools import pairwise

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)

from droppeft.transports.flower.strict_json import Malformed, one_line
from droppeft.transports.flower.wire_format import Packed

MOST_REASON = 200
"""Characters of the longest sentence about an error."""

_FORMAT = "safetensors"

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

_RAISED = re.compile(r"<class '([^']*)'>:<'(.*)'>", re.DOTALL)

# What happened, and whether the text that comes with it adds anything.
_MEANINGS = {
    ErrorCode.UNKNOWN: ("the client failed", True),
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: ("the client cannot load its app", True),
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: ("the client's app raised an error", True),
    ErrorCode.MESSAGE_UNAVAILABLE: ("the message or its reply is gone: late, or cut off", False),
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: ("the reply came, but was not fetched in time", False),
    ErrorCode.NODE_UNAVAILABLE: ("the client's node gives no sign of life", False),
    ErrorCode.MOD_FAILED_PRECONDITION: ("a mod of the client's app refused the message", True),
    ErrorCode.INVALID_FAB: ("the client could not verify the app's bundle", False),
    ErrorCode.CLIENT_APP_CRASHED: ("the client's app died while it worked", False),
}


def record_of(packed: Packed) -> RecordDict:
    """Put a message into Flower's records: a text, and one Array that is the blob as it is."""
    blob = Array("uint8", (len(packed.tensors),), _FORMAT, packed.tensors)
    return RecordDict(
        {
            "head": ConfigRecord({"json": packed.head}),
            "tensors": ArrayRecord({_FORMAT: blob}),
        }
    )


def packed_of(record: RecordDict) -> Packed:
    """Take a message out of Flower's records; the blob is not read yet.

    Raises:
        Malformed: the records are not those that :func:`record_of` makes.
    """
    if set(record) != {"head", "tensors"}:
        raise Malformed("the message has other records than head and tensors")
    return Packed(_text_of(record["head"]), _blob_of(record["tensors"]))


def framed_bytes(record: RecordDict) -> int:
    """Count the bytes of all objects that Flower sends for a message's content, each once.

    That is what one client loads or sends, and a function of the content alone. Not counted: the
    Message object around it (addresses and times, 100 to 300 bytes), and HTTP.
    """
    with no_object_id_recompute():
        return sum(len(part.deflate()) for part in get_all_nested_objects(record).values())


def error_reason(code: int, reason: str | None) -> str:
    """Say in one sentence what an error of Flower's means.

    Args:
        code: one of Flower's ``ErrorCode``, or unknown.
        reason: what came with it: a sentence, an exception, or a traceback of Ray's with colours.
    """
    meaning, telling = _MEANINGS.get(code, (f"Flower reports error {code}", True))
    detail = _essence(reason or "") if telling else ""
    return one_line(f"{meaning}: {detail}" if detail else meaning, MOST_REASON)


def _text_of(record: object) -> str:
    if not isinstance(record, ConfigRecord) or set(record) != {"json"}:
        raise Malformed("the message's head is not one JSON text")
    text = record["json"]
    if not isinstance(text, str):
        raise Malformed("the message's head is not a text")
    return text


def _blob_of(record: object) -> bytes:
    if not isinstance(record, ArrayRecord) or set(record) != {_FORMAT}:
        raise Malformed(f"the message's tensors are not one {_FORMAT} array")
    array = record[_FORMAT]
    if (array.dtype, array.shape, array.stype) != ("uint8", (len(array.data),), _FORMAT):
        raise Malformed("the message's tensors are not what their description says")
    return bytes(array.data)


def _essence(reason: str) -> str:
    """Find the line that says what went wrong."""
    plain = _COLOUR.sub("", reason).strip()
    match = _RAISED.fullmatch(plain)
    name, text = match.groups() if match else ("", plain)
    lines = [line for line in text.splitlines() if line.strip()]
    # Ray wraps the traceback of the exception that Flower wraps around the app's own.
    raised = [line for line in _after_indented(lines) if "ClientAppException" not in line]
    if raised:
        return raised[-1].strip()
    return ": ".join(part for part in (name.rpartition(".")[2], *lines[:1]) if part)


def _after_indented(lines: list[str]) -> list[str]:
    """The lines that end a traceback, or a list of facts."""
    return [line for before, line in pairwise(lines) if before[0].isspace() > line[0].isspace()]
