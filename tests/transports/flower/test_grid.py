"""Instructions over a Flower grid: each reply finds its client, and errors become failures."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from droppeft.client.published_task import PublishedTask
from droppeft.config import FlowerConfig
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Update
from droppeft.refusals import Refused
from droppeft.transports.base import Arrival
from droppeft.transports.flower import client_app, grid
from droppeft.transports.flower.grid import OverGrid
from droppeft.transports.flower.messenger import Messenger
from droppeft.transports.flower.nodes import Directory
from droppeft.transports.flower.records import packed_of, record_of
from droppeft.transports.flower.wire_format import RunContext, pack_reply, unpack_instruction
from handmade import instruction_for, layout, update_for

SUPERLINK = 1
RUN_CONTEXT = RunContext({"seed": 0}, PublishedTask("classification", (), "m", "t"))
QUICK = FlowerConfig(deadline_s=1.0)


class Nodes:
    """A grid whose nodes reply as told; ids of nodes are arbitrary, as in Flower.

    Attributes:
        clients: by node id, the client that the node says it is.
        keys: by node id, its public key.
        answer: from (node, instruction) to the content or error of the reply; ``None`` for no
            reply.
    """

    def __init__(self, clients: dict[int, Any], answer: Callable[[int, Instruction], Any]):
        self.clients = clients
        self.answer = answer
        self.keys: dict[int, bytes] = {}
        self.sent: list[Message] = []
        self.introduced: list[int] = []
        self.questions: list[Message] = []
        self._numbers = itertools.count(1)
        self._replies: dict[str, Message] = {}

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=self.keys.get(node)) for node in self.clients]

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
        return introduction(self.clients[node])

    def pull_messages(self, names: list[str]) -> Iterator[Message]:
        # Flower's grids hand out everything that has come for those names, once.
        return iter([self._replies.pop(name) for name in names if name in self._replies])


def introduction(client: Any) -> RecordDict:
    return RecordDict({"node": ConfigRecord({"client": client})})


def one_each(count: int) -> dict[int, int]:
    return {900 - 7 * client: client for client in range(count)}


def good(node: int, instruction: Instruction) -> RecordDict:
    return record_of(pack_reply(update_for(instruction, float(instruction.client))))


def over(
    nodes: Any, clients: int = 0, keys: dict[bytes, int] | None = None, **settings: float
) -> OverGrid:
    """A transport of a run of this many clients."""
    messenger = Messenger(nodes)
    chosen = QUICK.model_copy(update=settings)
    directory = Directory(messenger, 9, keys, lambda text: said.append(text), patience_s=0.3)
    return OverGrid(messenger, directory, RUN_CONTEXT, clients, chosen, layout)


said: list[str] = []
"""What the operator of the server was told in a test."""


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
    said.clear()
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
        return record_of(pack_reply(Refused("too_few_rows", 20)))

    [arrival] = exchange(over(Nodes(one_each(2), failing)), 1).values()
    assert reason(arrival).startswith("it has fewer rows of this task")
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
    class Full(Nodes):
        def push_messages(self, messages: list[Message]) -> list[str]:
            if messages[0].metadata.message_type == "query":
                return super().push_messages(messages)
            if isinstance(answer, Exception):
                raise answer
            return list(answer)

    start = time.monotonic()
    arrivals = exchange(over(Full(one_each(3), good), deadline_s=1000.0), 0, 1, 2)
    assert time.monotonic() - start < 100
    for arrival in arrivals.values():
        assert reason(arrival).startswith("could not be sent: ")


def test_a_run_waits_for_the_nodes_of_all_clients_and_a_round_does_not() -> None:
    nodes = Nodes({5: 0}, good)
    transport = over(nodes)
    start = time.monotonic()
    transport.directory.wait_for(range(2), 0.5, lambda: None)
    assert time.monotonic() - start > 0.5
    arrivals = exchange(transport, 0, 1)
    assert reason(arrivals[1]) == "it has no node (none has connected)"
    assert isinstance(arrivals[0].reply, Update)


def test_nodes_are_asked_once_and_new_ones_when_they_appear() -> None:
    nodes = Nodes({5: 0}, good)
    transport = over(nodes)
    exchange(transport, 0)
    nodes.clients[9] = 1
    assert isinstance(exchange(transport, 0, 1)[1].reply, Update)
    assert nodes.introduced == [5, 9]


def test_a_node_that_came_back_under_another_id_serves_again() -> None:
    nodes = Nodes(one_each(1), good)
    transport = over(nodes)
    exchange(transport, 0)
    nodes.clients = {77: 0}
    exchange(transport, 0)
    assert [message.metadata.dst_node_id for message in nodes.sent] == [900, 77]


def test_a_disconnected_node_is_not_used() -> None:
    nodes = Nodes(one_each(2), good)
    transport = over(nodes)
    exchange(transport, 0, 1)
    del nodes.clients[893]
    arrivals = exchange(transport, 0, 1)
    assert isinstance(arrivals[0].reply, Update)
    assert reason(arrivals[1]).startswith("it has no node")


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
    assert reason(exchange(transport, 0)[0]).startswith("it has no node")
    nodes._replies["message 1"] = Message(introduction(0), reply_to=nodes.questions[0])
    assert isinstance(exchange(transport, 0)[0].reply, Update)
    assert nodes.introduced == [900]
    assert nodes.questions[0].metadata.ttl > 100  # longer than the deadline of an instruction


def test_a_node_that_failed_to_introduce_itself_is_asked_again() -> None:
    nodes = LateNodes(Error(8, ""))
    transport = over(nodes)
    transport.directory.patience_s = 100.0
    assert reason(exchange(transport, 0)[0]).startswith("it has no node")
    assert nodes.introduced == [900]  # at once it would fail again
    transport.directory.patience_s = 0.0
    assert isinstance(exchange(transport, 0)[0].reply, Update)
    assert nodes.introduced == [900, 900]


def test_a_node_that_is_silent_delays_no_other_and_only_one_round() -> None:
    nodes = LateNodes(None)
    nodes.clients[893] = 1  # which is asked first
    transport = over(nodes, deadline_s=20.0)
    transport.directory.patience_s = 1.0
    arrivals = transport.exchange([instruction_for(1), instruction_for(0)])
    assert isinstance(next(arrivals).reply, Update)
    assert "has not said which client it is" in reason(next(arrivals))
    assert not transport.directory.expects(1)
    assert reason(exchange(transport, 1)[1]).startswith("it has no node")


def test_a_node_that_introduces_itself_during_a_round_takes_part_in_it() -> None:
    nodes = LateNodes(None)
    nodes.clients[950] = 1

    def answer(node: int, instruction: Instruction) -> RecordDict:
        nodes._replies["message 1"] = Message(introduction(0), reply_to=nodes.questions[0])
        return good(node, instruction)

    nodes.answer = answer
    transport = over(nodes, deadline_s=20.0)
    transport.directory.patience_s = 20.0
    assert isinstance(exchange(transport, 0, 1)[0].reply, Update)
    assert [message.metadata.dst_node_id for message in nodes.sent] == [950, 900]


def test_a_node_that_never_introduces_itself_is_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = Nodes(one_each(1), good)
    monkeypatch.setattr(nodes, "introduction_of", lambda node: Error(8, ""))
    assert "(node 900 did not say which client it is: the client's app crashed" in reason(
        exchange(over(nodes), 0)[0]
    )


@pytest.mark.parametrize("client", [-1, 9, "0", 2.5], ids=str)
def test_a_node_that_is_no_client_of_the_run_is_refused(client: Any) -> None:
    arrivals = exchange(over(Nodes({5: client}, good)), 0)
    expected = "clients 0 to 8" if client == 9 else "does not say which client"
    assert expected in said[0]
    if client != 9:
        assert f"(node 5 is refused: it {expected}" in reason(arrivals[0])


def test_the_first_of_two_nodes_that_are_the_same_client_remains_while_it_is_connected() -> None:
    nodes = Nodes({7: 0, 8: 0}, good)
    transport = over(nodes)
    exchange(transport, 0)
    exchange(transport, 0)
    assert said == ["node 8 is refused: it says that it is client 0, which node 7 is"]
    del nodes.clients[7]
    exchange(transport, 0)
    assert [message.metadata.dst_node_id for message in nodes.sent] == [7, 7, 8]
    assert said[1:] == ["client 0 has a node again"]


def test_a_node_must_have_the_key_of_the_client_that_it_says_it_is() -> None:
    """Node 5 has the key of client 0, node 6 that of client 1, node 7 another."""
    nodes = Nodes({5: 0, 6: 0, 7: 2}, good)
    nodes.keys = {5: b"key 0", 6: b"key 1", 7: b"another"}
    arrivals = exchange(over(nodes, 3, {b"key 0": 0, b"key 1": 1, b"key 2": 2}), 0, 1, 2)
    assert isinstance(arrivals[0].reply, Update)
    assert [message.metadata.dst_node_id for message in nodes.sent] == [5]
    assert nodes.introduced == [5, 6]
    lied = "node 6 is refused: it says that it is client 0, and its key is that of client 1"
    unknown = "node 7 is refused: its key is none of the clients' (client_keys)"
    assert set(said[:2]) == {lied, unknown}
    assert lied in reason(arrivals[1])
    assert unknown in reason(arrivals[2])
    assert said[2].startswith("without a node: client 1 (node 6 is refused: ")
    assert f"client 2 ({unknown})" in said[2]


class Interrupted(Nodes):
    """The node of client 0 is lost with the first instruction, and comes back if told."""

    def __init__(self, back: bool) -> None:
        self.lost = 0
        super().__init__(one_each(2), self._answer)
        self.back = back

    def _answer(self, node: int, instruction: Instruction) -> Any:
        if instruction.client == 0 and not self.lost:
            self.lost = node
            del self.clients[node]
            return Error(5, "")
        return good(node, instruction)

    def pull_messages(self, names: list[str]) -> Iterator[Message]:
        if self.lost and self.back:
            self.clients[self.lost] = 0
        return super().pull_messages(names)


def test_an_instruction_is_sent_again_to_a_node_that_was_lost_and_is_back() -> None:
    nodes = Interrupted(back=True)
    arrivals = exchange(over(nodes, deadline_s=20.0), 0, 1)
    assert isinstance(arrivals[0].reply, Update)
    assert [message.metadata.dst_node_id for message in nodes.sent] == [900, 893, 900]


def test_a_node_that_does_not_come_back_is_waited_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grid, "RECONNECT_S", 0.3)
    arrivals = exchange(over(Interrupted(back=False), deadline_s=20.0), 0, 1)
    assert reason(arrivals[0]) == "the client's node is unavailable"
    assert isinstance(arrivals[1].reply, Update)


def test_waiting_stops_when_no_reply_can_come() -> None:
    def gone() -> None:
        raise RuntimeError("the engine is gone")

    nodes = Nodes(one_each(1), lambda node, instruction: None)
    transport = replace(over(nodes), check=gone)
    with pytest.raises(RuntimeError, match="engine is gone"):
        list(transport.exchange([instruction_for(0)]))


def test_a_node_says_which_client_it_is(tmp_path: Path) -> None:
    """By its node file; in a simulation by its number."""
    from flwr.app import Context

    file = tmp_path / "node.toml"
    file.write_text('client = 4\ndata = "rows.csv"')
    message = Message(RecordDict(), dst_node_id=7, message_type="query")
    configs: list[tuple[dict[str, Any], int]] = [
        ({"node-file": str(file), "partition-id": 3}, 4),
        ({"node-file": str(tmp_path / "missing.toml"), "partition-id": 3}, -1),
        ({"partition-id": 3, "num-partitions": 8}, 3),
        ({"partition-id": "a"}, -1),
        ({}, -1),
    ]
    for config, expected in configs:
        context = Context(1, 7, config, RecordDict(), {})
        assert client_app.app(message, context).content["node"]["client"] == expected


def test_a_client_process_starts_without_torch() -> None:
    """A SuperNode starts one for every message; the model server has loaded torch already."""
    code = "import sys, droppeft.transports.flower.client_app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
