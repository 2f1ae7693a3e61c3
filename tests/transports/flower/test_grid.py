"""Instructions over a Flower grid: each reply finds its client, and errors become failures."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from droppeft.client.published_task import PublishedTask
from droppeft.config import FlowerConfig
from droppeft.messages import Failure, Instruction, Update
from droppeft.refusals import Refused
from droppeft.transports.base import Arrival
from droppeft.transports.flower import client_app
from droppeft.transports.flower.grid import OverGrid
from droppeft.transports.flower.messenger import Messenger
from droppeft.transports.flower.nodes import Directory
from droppeft.transports.flower.records import packed_of, record_of
from droppeft.transports.flower.wire_format import RunContext, pack_reply, unpack_instruction
from handmade import instruction_for, layout, update_for

SUPERLINK = 1
RUN_CONTEXT = RunContext({"seed": 0}, PublishedTask("classification", (), "m", "t"))
QUICK = FlowerConfig(deadline_s=1.0, nodes_timeout_s=0.2)


class Nodes:
    """A grid whose nodes reply as told; ids of nodes are arbitrary, as in Flower.

    Attributes:
        parts: by node id, the partition that the node serves.
        answer: from (node, instruction) to the content or error of the reply; ``None`` for no
            reply.
    """

    def __init__(self, parts: dict[int, dict[str, int]], answer: Callable[[int, Instruction], Any]):
        self.parts = parts
        self.answer = answer
        self.sent: list[Message] = []
        self.introduced: list[int] = []
        self.questions: list[Message] = []
        self._numbers = itertools.count(1)
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.parts)

    def push_messages(self, messages: list[Message]) -> list[str]:
        return [self._take(message) for message in messages]

    def _take(self, message: Message) -> str:
        name = f"message {next(self._numbers)}"
        message.metadata.__dict__["_message_id"] = name
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "query":
            self.introduced.append(node)
            self.questions.append(message)
            content: Any = self.introduction_of(node)
        else:
            self.sent.append(message)
            content = self.answer(node, unpack_instruction(packed_of(message.content))[0])
        if content is not None:
            self._replies[name] = Message(content, reply_to=message)
        return name

    def introduction_of(self, node: int) -> Any:
        return introduction(**self.parts[node])

    def pull_messages(self, names: list[str]) -> Iterator[Message]:
        # Flower's grids hand out everything that has come for those names, once.
        return iter([self._replies.pop(name) for name in names if name in self._replies])


def introduction(partition: Any, partitions: Any) -> RecordDict:
    return RecordDict({"node": ConfigRecord({"partition": partition, "partitions": partitions})})


def one_each(count: int) -> dict[int, dict[str, int]]:
    return {900 - 7 * part: {"partition": part, "partitions": count} for part in range(count)}


def good(node: int, instruction: Instruction) -> RecordDict:
    return record_of(pack_reply(update_for(instruction, float(instruction.client))))


def over(nodes: Any, clients: int = 0, **settings: float) -> OverGrid:
    """A transport that waits at its start for this many clients."""
    messenger = Messenger(nodes)
    chosen = QUICK.model_copy(update=settings)
    return OverGrid(messenger, Directory(messenger), RUN_CONTEXT, clients, chosen, layout)


def exchange(transport: OverGrid, *clients: int) -> dict[int, Arrival]:
    instructions = [instruction_for(client) for client in clients]
    arrivals = list(transport.exchange(instructions))
    assert sorted(arrival.index for arrival in arrivals) == list(range(len(instructions)))
    return {instructions[arrival.index].client: arrival for arrival in arrivals}


def reason(arrival: Arrival) -> str:
    assert isinstance(arrival.reply, Failure)
    return arrival.reply.reason


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower allows messages only within a task."""
    for name, value in {"_task_id": 1, "_run_id": 2, "_node_id": SUPERLINK}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


def test_each_client_gets_its_own_instruction_and_its_reply_is_its_own() -> None:
    nodes = Nodes(one_each(4), good)
    arrivals = exchange(over(nodes), 2, 0, 3)
    for client, arrival in arrivals.items():
        assert isinstance(arrival.reply, Update)
        assert arrival.reply.client == client
        assert float(arrival.reply.tensors["head"]["head.W"][0]) == client
    assert [message.metadata.dst_node_id for message in nodes.sent] == [886, 900, 879]
    assert {message.metadata.group_id for message in nodes.sent} == {"1"}
    assert unpack_instruction(packed_of(nodes.sent[0].content))[1] == RUN_CONTEXT


def test_a_node_serves_the_clients_of_its_partition() -> None:
    nodes = Nodes(one_each(3), good)
    exchange(over(nodes), 7, 5, 3)
    parts = [nodes.parts[message.metadata.dst_node_id]["partition"] for message in nodes.sent]
    assert parts == [1, 2, 0]


def test_a_reply_is_attributed_by_its_message_and_not_by_its_content() -> None:
    def swapped(node: int, instruction: Instruction) -> RecordDict:
        return record_of(pack_reply(update_for(instruction, client=1 - instruction.client)))

    arrivals = exchange(over(Nodes(one_each(2), swapped)), 0, 1)
    replies = [arrivals[client].reply for client in (0, 1)]
    assert [reply.client for reply in replies] == [1, 0]  # refused later, by validation


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, "cannot load its app"),
        (2, "the client's app raised an error"),
        (4, "not fetched in time"),
        (5, "is unavailable"),
        (8, "crashed"),
    ],
)
def test_an_error_reply_is_the_failure_of_its_client(code: int, said: str) -> None:
    def failing(node: int, instruction: Instruction) -> Any:
        return (
            Error(code, "ValueError: no rows")
            if instruction.client == 1
            else good(node, instruction)
        )

    arrivals = exchange(over(Nodes(one_each(3), failing)), 0, 1, 2)
    assert said in reason(arrivals[1])
    assert "no rows" not in reason(arrivals[1])  # the error of a node may hold anything
    assert isinstance(arrivals[0].reply, Update)
    assert isinstance(arrivals[2].reply, Update)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"head": ConfigRecord({"json": "{}"})}),
        RecordDict({"tensors": ArrayRecord({"x": Array(np.zeros(3))})}),
        record_of(
            pack_reply(replace(update_for(instruction_for(1)), tensors={0: {"a": np.zeros(10**6)}}))
        ),
    ],
    ids=["empty", "half", "array", "too large"],
)
def test_content_that_is_no_reply_is_refused(content: RecordDict) -> None:
    def odd(node: int, instruction: Instruction) -> Any:
        return content if instruction.client == 1 else good(node, instruction)

    arrivals = exchange(over(Nodes(one_each(2), odd)), 0, 1)
    assert reason(arrivals[1]).startswith("refused: ")
    assert isinstance(arrivals[0].reply, Update)


def test_a_failure_that_a_client_reports_is_passed_on() -> None:
    def failing(node: int, instruction: Instruction) -> RecordDict:
        return record_of(pack_reply(Refused("too_few_rows", 3, 20)))

    [arrival] = exchange(over(Nodes(one_each(2), failing)), 1).values()
    assert reason(arrival).startswith("it has 3 rows of this task")
    assert arrival.reply.client == 1


def test_a_late_reply_is_a_failure_and_is_ignored_when_it_arrives() -> None:
    silent = {1}

    def answer(node: int, instruction: Instruction) -> Any:
        return None if instruction.client in silent else good(node, instruction)

    nodes = Nodes(one_each(2), answer)
    transport = over(nodes, deadline_s=0.3)
    arrivals = exchange(transport, 0, 1)
    assert reason(arrivals[1]) == "no reply within 0.3 s"
    assert isinstance(arrivals[0].reply, Update)
    silent.clear()
    nodes._replies["message 4"] = Message(good(0, instruction_for(1)), reply_to=nodes.sent[1])
    [again] = exchange(transport, 0).values()
    assert isinstance(again.reply, Update)
    assert again.reply.client == 0


class Failing(Nodes):
    """Raises an error when the first reply is fetched, as often as told."""

    def __init__(self, error: Exception, times: int) -> None:
        super().__init__(one_each(2), good)
        self.error, self.times = error, times

    def pull_messages(self, names: list[str]) -> Iterator[Message]:
        if self.times and any(sent.metadata.message_id in names for sent in self.sent[:1]):
            self.times -= 1
            raise self.error
        return super().pull_messages(names)


def test_a_reply_that_flower_cannot_read_hides_no_other() -> None:
    arrivals = exchange(over(Failing(ValueError("chunks do not fit"), 1)), 0, 1)
    said = "its reply could not be read: ValueError: chunks do not fit"
    assert reason(arrivals[0]) == said
    assert isinstance(arrivals[1].reply, Update)


def test_a_fetch_is_repeated_while_the_superlink_cannot_be_reached() -> None:
    arrivals = exchange(over(Failing(httpx.ConnectError("refused"), 3)), 0, 1)
    assert isinstance(arrivals[0].reply, Update)


@pytest.mark.parametrize("answer", [[], [None], httpx.ConnectError("refused")], ids=str)
def test_an_instruction_that_could_not_be_sent_fails_at_once(answer: Any) -> None:
    """Two of the three are for one node: each has a failure of its own."""

    class Full(Nodes):
        def push_messages(self, messages: list[Message]) -> list[str]:
            if messages[0].metadata.message_type == "query":
                return super().push_messages(messages)
            if isinstance(answer, Exception):
                raise answer
            return list(answer)

    start = time.monotonic()
    arrivals = exchange(over(Full(one_each(2), good), deadline_s=1000.0), 0, 1, 2)
    assert time.monotonic() - start < 100
    for arrival in arrivals.values():
        assert reason(arrival).startswith("could not be sent: ")


def test_only_the_first_exchange_waits_for_the_nodes_of_all_clients() -> None:
    nodes = Nodes({5: {"partition": 0, "partitions": 2}}, good)
    transport = over(nodes, clients=2, nodes_timeout_s=0.5)
    start = time.monotonic()
    arrivals = exchange(transport, 0, 1)
    assert time.monotonic() - start > 0.5
    assert reason(arrivals[1]) == "no node serves this client (none is connected)"
    assert isinstance(arrivals[0].reply, Update)
    transport.settings = QUICK.model_copy(update={"nodes_timeout_s": 1000.0})
    assert reason(exchange(transport, 1)[1]).startswith("no node serves this client")


def test_nodes_are_asked_once_and_new_ones_when_they_appear() -> None:
    nodes = Nodes({5: {"partition": 0, "partitions": 2}}, good)
    transport = over(nodes)
    exchange(transport, 0)
    nodes.parts[9] = {"partition": 1, "partitions": 2}
    assert isinstance(exchange(transport, 0, 1)[1].reply, Update)
    assert nodes.introduced == [5, 9]


def test_a_node_that_came_back_under_another_id_serves_again() -> None:
    nodes = Nodes(one_each(1), good)
    transport = over(nodes)
    exchange(transport, 0)
    nodes.parts = {77: {"partition": 0, "partitions": 1}}
    exchange(transport, 0)
    assert [message.metadata.dst_node_id for message in nodes.sent] == [900, 77]


def test_a_disconnected_node_is_not_used() -> None:
    nodes = Nodes(one_each(2), good)
    transport = over(nodes)
    exchange(transport, 0, 1)
    del nodes.parts[893]
    arrivals = exchange(transport, 0, 1)
    assert isinstance(arrivals[0].reply, Update)
    assert reason(arrivals[1]).startswith("no node serves this client")


class LateNodes(Nodes):
    """Replies to the first query late or with an error."""

    def __init__(self, first: Any) -> None:
        super().__init__(one_each(1), good)
        self.first = first

    def introduction_of(self, node: int) -> Any:
        return self.first if self.introduced == [node] else super().introduction_of(node)


def test_a_late_introduction_counts_when_it_comes() -> None:
    nodes = LateNodes(None)
    transport = over(nodes)
    assert reason(exchange(transport, 0)[0]).startswith("no node serves")
    nodes._replies["message 1"] = Message(introduction(0, 1), reply_to=nodes.questions[0])
    assert isinstance(exchange(transport, 0)[0].reply, Update)
    assert nodes.introduced == [900]
    assert nodes.questions[0].metadata.ttl > 100  # longer than the deadline of an instruction


def test_a_node_that_failed_to_introduce_itself_is_asked_again() -> None:
    nodes = LateNodes(Error(8, ""))
    assert isinstance(exchange(over(nodes), 0)[0].reply, Update)
    assert nodes.introduced == [900, 900]


def test_a_node_that_never_introduces_itself_is_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = Nodes(one_each(1), good)
    monkeypatch.setattr(nodes, "introduction_of", lambda node: Error(8, ""))
    assert "(node 900: the client's app crashed" in reason(exchange(over(nodes), 0)[0])


@pytest.mark.parametrize(
    "part",
    [(-1, 0), (2, 2), (0, 0), ("0", 1), (0, 2.5)],
    ids=str,
)
def test_a_node_without_a_usable_part_serves_nothing(part: tuple[Any, Any]) -> None:
    nodes = Nodes({5: {"partition": part[0], "partitions": part[1]}}, good)
    assert "node 5: no partition-id" in reason(exchange(over(nodes), 0)[0])


def test_waiting_stops_when_no_reply_can_come() -> None:
    def gone() -> None:
        raise RuntimeError("the engine is gone")

    nodes = Nodes(one_each(1), lambda node, instruction: None)
    transport = replace(over(nodes), check=gone)
    with pytest.raises(RuntimeError, match="engine is gone"):
        list(transport.exchange([instruction_for(0)]))


def test_a_node_reports_its_partition() -> None:
    from flwr.app import Context

    message = Message(RecordDict(), dst_node_id=7, message_type="query")
    for config, expected in [
        ({"partition-id": 3, "num-partitions": 8}, (3, 8)),
        ({}, (-1, 0)),
        ({"partition-id": "a"}, (-1, 0)),
    ]:
        context = Context(1, 7, config, RecordDict(), {})
        record = client_app.app(message, context).content["node"]
        assert (record["partition"], record["partitions"]) == expected


def test_a_client_process_starts_without_torch() -> None:
    """A SuperNode starts one for every message; the model server has loaded torch already."""
    code = "import sys, droppeft.transports.flower.client_app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
