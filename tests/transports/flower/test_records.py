"""Flower's records: messages come back unchanged."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, push_objects
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from droppeft.messages.reply import Update
from droppeft.transports.flower.records import MOST_REASON, error_reason, packed_of, record_of
from droppeft.transports.flower.wire_format import Malformed, Packed, pack_reply, unpack_reply
from handmade import instruction_for, update_for

CHUNK = 5_242_880  # Flower's own default


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower sets before it runs an app."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def pushed(message: Message) -> dict[str, bytes]:
    """The objects that Flower's own code sends for a message, by object id."""
    sent: dict[str, bytes] = {}
    push_objects(get_all_nested_objects(message), sent.__setitem__)
    return sent


def delivered(record: RecordDict) -> RecordDict:
    """The content of a message after Flower has serialised and deserialised it."""
    message = Message(record, 7, "train")
    parts = pushed(message)
    arrived = inflate_object_from_contents(message.object_id, parts)
    assert isinstance(arrived, Message)
    return arrived.content


@given(st.text(st.characters(exclude_categories=["Cs"])), st.binary())
def test_a_message_survives_flowers_records(head: str, tensors: bytes) -> None:
    packed = Packed(head, tensors)
    assert packed_of(record_of(packed)) == packed


@pytest.mark.parametrize("size", [0, 1, CHUNK, 2 * CHUNK + 5])
def test_a_message_survives_the_way_through_flower(size: int) -> None:
    packed = Packed('{"a": "é"}', b"\x07" * size)
    assert packed_of(delivered(record_of(packed))) == packed


def test_an_update_survives_the_way_through_flower() -> None:
    update = update_for(
        instruction_for(), tensors={3: {"w": np.arange(6, dtype="f4").reshape(2, 3)}}
    )
    back = unpack_reply(packed_of(delivered(record_of(pack_reply(update)))), 10_000)
    assert isinstance(back, Update)
    assert back.tensors[3]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back.cost == update.cost


def described(**changes: Any) -> ArrayRecord:
    fields = {"dtype": "uint8", "shape": (3,), "stype": "safetensors", "data": b"abc", **changes}
    return ArrayRecord({"safetensors": Array(**fields)})


HEAD = ConfigRecord({"json": "{}"})


def test_a_correct_description_is_accepted() -> None:
    assert packed_of(RecordDict({"head": HEAD, "tensors": described()})) == Packed("{}", b"abc")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ({}, "other records"),
        ({"head": HEAD}, "other records"),
        ({"head": HEAD, "tensors": described(), "more": HEAD}, "other records"),
        ({"head": described(), "tensors": described()}, "head is not one JSON text"),
        ({"head": MetricRecord({"json": 1}), "tensors": described()}, "head is not one JSON"),
        ({"head": ConfigRecord({}), "tensors": described()}, "head is not one JSON text"),
        ({"head": ConfigRecord({"text": "{}"}), "tensors": described()}, "head is not one JSON"),
        ({"head": ConfigRecord({"json": "", "x": 1}), "tensors": described()}, "head is not one"),
        ({"head": ConfigRecord({"json": 3}), "tensors": described()}, "head is not a string"),
        ({"head": ConfigRecord({"json": b"{}"}), "tensors": described()}, "head is not a string"),
        ({"head": HEAD, "tensors": HEAD}, "not one safetensors array"),
        ({"head": HEAD, "tensors": ConfigRecord({"safetensors": b"abc"})}, "not one safetensors"),
        ({"head": HEAD, "tensors": ArrayRecord()}, "not one safetensors array"),
        ({"head": HEAD, "tensors": ArrayRecord([np.zeros(3)])}, "not one safetensors array"),
        ({"head": HEAD, "tensors": described(dtype="int8")}, "description"),
        ({"head": HEAD, "tensors": described(stype="numpy.ndarray")}, "description"),
        ({"head": HEAD, "tensors": described(shape=(4,))}, "description"),
        ({"head": HEAD, "tensors": described(shape=(3, 1))}, "description"),
        ({"head": HEAD, "tensors": described(shape=(10**15,))}, "description"),
    ],
)
def test_other_records_are_refused(records: Any, expected: str) -> None:
    with pytest.raises(Malformed, match=expected):
        packed_of(RecordDict(records))


def codes() -> dict[str, int]:
    """Every error code that Flower knows."""
    return {name: code for name, code in vars(ErrorCode).items() if isinstance(code, int)}


@pytest.mark.parametrize("code", codes().values(), ids=codes().keys())
def test_every_error_of_flowers_has_a_meaning(code: int) -> None:
    sentence = error_reason(code, None)
    assert sentence.isprintable()
    assert "Flower reports" not in sentence
    assert not sentence.endswith(":")


def test_an_unknown_error_is_described_by_its_number() -> None:
    assert error_reason(99, "the sky fell") == "Flower reports error 99: the sky fell"


# Texts as flwr 1.41 with ray 2.55 sent them.
RAISED = "<class 'ZeroDivisionError'>:<'division by zero'>"
OF_RAY = (
    "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'"
    "\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=1, ip=127.0.0.1)\n"
    '  File "/app/client.py", line 6, in train\n'
    '  File "/app/client.py", line 4, in boom\n'
    "KeyError: 'no such key'\n\n"
    "The above exception was the direct cause of the following exception:\n\n"
    "\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=1, ip=127.0.0.1)\n"
    '  File "/flwr/ray_actor.py", line 62, in run\n'
    "flwr.clientapp.client_app.ClientAppException: \n"
    "Exception ClientAppException occurred. Message: 'no such key''>"
)
OF_RAY_TWICE = OF_RAY.replace(
    "The above",
    "During handling of the above exception, another exception occurred:\n\n"
    "\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=1, ip=127.0.0.1)\n"
    '  File "/app/client.py", line 8, in train\n'
    "ValueError: no such key\n\n"
    "The above",
)
DEAD_ACTOR = (
    "<class 'ray.exceptions.ActorDiedError'>:<'"
    "The actor died unexpectedly before finishing this task.\n"
    "\tclass_name: ClientAppActor\n\tactor_id: 0972d1d4492e63708d2da37101000000\n"
    "\tpid: 28893\n\tip: 127.0.0.1\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
    "Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. "
    "Some common causes include: (1) the process was killed by the OOM killer due to high memory "
    "usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly.'>"
)
NO_MEMORY = (
    "<class 'ray.exceptions.OutOfMemoryError'>:<'"
    "Task was killed due to the node running low on memory.\n"
    "Memory on the node was 7GB / 8GB.\nRefer to the documentation.'>"
)
NO_HEARTBEAT = "Error: Node Unavailable — The destination node failed to report a heartbeat."


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (2, RAISED, "the client's app raised an error: ZeroDivisionError: division by zero"),
        (2, OF_RAY, "the client's app raised an error: KeyError: 'no such key'"),
        (2, OF_RAY_TWICE, "the client's app raised an error: ValueError: no such key"),
        (0, "<class 'KeyError'>:<''>", "the client failed: KeyError"),
        (0, "\x1b[1;31mred\x1b[0m alert", "the client failed: red alert"),
        (0, "", "the client failed"),
        (0, " \n ", "the client failed"),
        (0, "\n  AgentApp failed\nbefore replying.", "the client failed: AgentApp failed"),
        (
            0,
            NO_MEMORY,
            "the client failed: OutOfMemoryError: "
            "Task was killed due to the node running low on memory.",
        ),
        (5, NO_HEARTBEAT, "the client's node is unavailable"),
        (5, "forged\x1b[2J by somebody", "the client's node is unavailable"),
    ],
)
def test_an_error_becomes_a_sentence(code: int, reason: str, expected: str) -> None:
    assert error_reason(code, reason) == expected


def test_a_long_error_is_cut() -> None:
    sentence = error_reason(0, DEAD_ACTOR)
    assert sentence.startswith("the client failed: The actor is dead because its worker process")
    assert sentence.endswith("…")
    assert len(sentence) == MOST_REASON


def test_a_reply_with_an_error_says_why() -> None:
    request = Message(record_of(Packed("{}", b"")), 7, "train")
    error = Message(Error(2, RAISED), reply_to=request).error
    assert error_reason(error.code, error.reason).endswith("division by zero")


@given(st.integers(), st.text() | st.text("<class 'a.B'>:\n\t \x1b[31mFile", max_size=80))
def test_any_error_becomes_one_short_line(code: int, reason: str) -> None:
    sentence = error_reason(code, reason)
    assert sentence.isprintable()
    assert len(sentence) <= MOST_REASON
