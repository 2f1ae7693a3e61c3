"""Convert packed messages to Flower's records and back, and Flower's errors to sentences."""

import re
from itertools import pairwise

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import ErrorCode

from droppeft.transports.flower.wire_format import Malformed, Packed, one_line

MOST_REASON = 200
"""Largest number of characters of a sentence about an error."""

_FORMAT = "safetensors"

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

_RAISED = re.compile(r"<class '([^']*)'>:<'(.*)'>", re.DOTALL)

# What an error code means, and whether the text that Flower adds is worth showing.
_MEANINGS = {
    ErrorCode.UNKNOWN: ("the client failed", True),
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: ("the client cannot load its app", True),
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: ("the client's app raised an error", True),
    ErrorCode.MESSAGE_UNAVAILABLE: ("the message or its reply is gone: late, or cut off", False),
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: ("the reply came, but was not fetched in time", False),
    ErrorCode.NODE_UNAVAILABLE: ("the client's node is unavailable", False),
    ErrorCode.MOD_FAILED_PRECONDITION: ("a mod of the client's app refused the message", True),
    ErrorCode.INVALID_FAB: ("the client could not verify the app's bundle", False),
    ErrorCode.CLIENT_APP_CRASHED: ("the client's app crashed", False),
}


def record_of(packed: Packed) -> RecordDict:
    """Put a packed message into Flower's records: its text, and its blob as one array."""
    blob = Array("uint8", (len(packed.tensors),), _FORMAT, packed.tensors)
    return RecordDict(
        {
            "head": ConfigRecord({"json": packed.head}),
            "tensors": ArrayRecord({_FORMAT: blob}),
        }
    )


def packed_of(record: RecordDict) -> Packed:
    """Take a packed message out of Flower's records; the blob is not parsed yet.

    Raises:
        Malformed: the records were not made by :func:`record_of`.
    """
    if set(record) != {"head", "tensors"}:
        raise Malformed("the message has other records than head and tensors")
    return Packed(_text_of(record["head"]), _blob_of(record["tensors"]))


def error_reason(code: int, reason: str | None) -> str:
    """Describe an error of Flower in one sentence.

    Args:
        code: one of Flower's ``ErrorCode``, or an unknown one.
        reason: Flower's text: a sentence, an exception, or a traceback of Ray with colour codes;
            ``None`` leaves it out, since an error of a node may hold anything.
    """
    meaning, show_reason = _MEANINGS.get(code, (f"Flower reports error {code}", True))
    detail = _essence(reason or "") if show_reason else ""
    return one_line(f"{meaning}: {detail}" if detail else meaning, MOST_REASON)


def _text_of(record: object) -> str:
    if not isinstance(record, ConfigRecord) or set(record) != {"json"}:
        raise Malformed("the message's head is not one JSON text")
    text = record["json"]
    if not isinstance(text, str):
        raise Malformed("the message's head is not a string")
    return text


def _blob_of(record: object) -> bytes:
    if not isinstance(record, ArrayRecord) or set(record) != {_FORMAT}:
        raise Malformed(f"the message's tensors are not one {_FORMAT} array")
    array = record[_FORMAT]
    if (array.dtype, array.shape, array.stype) != ("uint8", (len(array.data),), _FORMAT):
        raise Malformed("the message's tensors do not fit their description")
    return bytes(array.data)


def _essence(reason: str) -> str:
    """Find the line of a text that names the error."""
    plain = _COLOUR.sub("", reason).strip()
    match = _RAISED.fullmatch(plain)
    name, text = match.groups() if match else ("", plain)
    lines = [line for line in text.splitlines() if line.strip()]
    # A traceback of Ray shows the app's exception and the ClientAppException around it.
    raised = [line for line in _after_indented(lines) if "ClientAppException" not in line]
    if raised:
        return raised[-1].strip()
    return ": ".join(part for part in (name.rpartition(".")[2], *lines[:1]) if part)


def _after_indented(lines: list[str]) -> list[str]:
    """The lines that follow an indented line, such as the last line of a traceback."""
    return [line for before, line in pairwise(lines) if before[0].isspace() > line[0].isspace()]
