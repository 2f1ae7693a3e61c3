"""Flower as the transport: our round loop over any of its grids.

Flower's own strategies are not used: they send everybody the same, want the same keys back from
all, and cannot resume (docs/decisions/0002).
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from droppeft.config import FlowerConfig, as_tree
from droppeft.federation.loading import Loaded, identity
from droppeft.federation.messages import error_reason, framed_bytes, packed_of, record_of
from droppeft.federation.packing import Errand, Malformed, pack_plan, unpack_reply
from droppeft.federation.transport import Arrival
from droppeft.plans import AdapterSpec, Failure, Layout, Plan, Reply

_log = logging.getLogger("droppeft")

HEADER_BYTES = 1 << 20
"""What a reply may have beside its values."""

INTRODUCTION_S = 60.0
"""What a node may take to say which devices it serves."""


@dataclass
class OverGrid:
    """Plans as messages to nodes, replies as they come.

    A node with ``partition-id`` p of ``num-partitions`` n serves the devices d with d mod n = p,
    so that any number of nodes serves any number of devices.

    Attributes:
        grid: Flower's.
        errand: what a device needs beside its Plan.
        settings: deadlines.
        layout: the tensors of a Plan's adapter, which bound the size of a reply.
        check: called while waiting; raises when no reply can come any more.
    """

    grid: Grid
    errand: Errand
    settings: FlowerConfig
    layout: Callable[[AdapterSpec], Layout]
    check: Callable[[], None] = lambda: None
    _served: dict[int, tuple[int, int] | None] = field(default_factory=dict)
    _trouble: str = "none has introduced itself"
    _waited: bool = False

    def exchange(self, plans: Sequence[Plan]) -> Iterator[Arrival]:
        """Yield replies in order of arrival, then the failures of those that did not come."""
        nodes = self._nodes_of([plan.device for plan in plans])
        waiting: dict[str, int] = {}
        sent: dict[int, int] = {}
        for index, plan in enumerate(plans):
            if plan.device not in nodes:
                reason = f"no node serves this device ({self._trouble})"
                yield Arrival(index, Failure(plan.device, reason))
                continue
            record = record_of(pack_plan(plan, self.errand))
            sent[index] = framed_bytes(record)
            message = self._message(record, nodes[plan.device], "train", plan.round)
            waiting[self._push(message)] = index
        for index, answer in self._pull(waiting, self.settings.deadline_s):
            reply = self._reply(plans[index], answer)
            yield Arrival(index, reply, sent[index], _size(answer))

    def _reply(self, plan: Plan, message: Message | None) -> Reply:
        if message is None:
            return Failure(plan.device, f"no reply within {self.settings.deadline_s:g} s")
        if not message.has_content():
            return Failure(plan.device, _error_of(message))
        try:
            most = _bytes_of(self.layout(plan.adapter)) + HEADER_BYTES
            return unpack_reply(packed_of(message.content), most)
        except Malformed as error:
            return Failure(plan.device, f"refused: {error}")

    def _nodes_of(self, devices: Sequence[int]) -> Mapping[int, int]:
        """Find a connected node for each device; the first time, wait for them."""
        end = time.monotonic() + (0.0 if self._waited else self.settings.nodes_timeout_s)
        while True:
            self.check()
            connected = sorted(self.grid.get_node_ids())
            self._introduce([node for node in connected if node not in self._served])
            found = {
                device: node for device in devices if (node := self._node_of(device, connected))
            }
            if len(found) == len(set(devices)) or time.monotonic() >= end:
                self._waited = True
                return found
            time.sleep(0.2)

    def _node_of(self, device: int, connected: Sequence[int]) -> int | None:
        serving = [
            node
            for node, part in self._served.items()
            if part is not None and node in connected and device % part[1] == part[0]
        ]
        return serving[-1] if serving else None

    def _introduce(self, nodes: Sequence[int]) -> None:
        """Ask nodes which devices they serve."""
        asked: dict[str, int] = {}
        for node in nodes:
            message = self._message(RecordDict(), node, "query", 0)
            asked[self._push(message)] = node
        for node, answer in self._pull(asked, INTRODUCTION_S):
            part, trouble = _introduction(answer)
            self._served[node] = part
            if trouble:
                self._trouble = f"node {node}: {trouble}"
                _log.warning("node %d serves no device: %s", node, trouble)

    def _message(self, content: RecordDict, node: int, kind: str, round: int) -> Message:
        return Message(
            content,
            dst_node_id=node,
            message_type=kind,
            ttl=self.settings.deadline_s,
            group_id=str(round),
        )

    def _push(self, message: Message) -> str:
        """Send, and return the id under which the reply can be pulled."""
        pushed = list(self.grid.push_messages([message]))
        # Flower answers nothing, or None, for a message that it could not take.
        return (
            pushed[0] if pushed and pushed[0] else f"never sent to {message.metadata.dst_node_id}"
        )

    def _pull(
        self, waiting: Mapping[str, int], timeout_s: float
    ) -> Iterator[tuple[int, Message | None]]:
        """Yield (what was asked, reply) as replies come, with ``None`` for those that never do.

        Each reply is pulled by itself: one that Flower cannot read must not hide the others.
        """
        left = dict(waiting)
        end, pause_s = time.monotonic() + timeout_s, 0.02
        while left and time.monotonic() < end:
            self.check()
            came = [(name, message) for name in left for message in self._pulled(name)]
            for name, message in came:
                if name in left:
                    yield left.pop(name), message
            pause_s = 0.02 if came else min(pause_s * 1.5, 1.0)
            if left:
                time.sleep(pause_s)
        yield from ((asked, None) for asked in left.values())

    def _pulled(self, name: str) -> Iterable[Message | None]:
        try:
            return [
                message
                for message in self.grid.pull_messages([name])
                if message.metadata.reply_to_message_id == name
            ]
        except Exception as error:
            _log.warning("a reply could not be read: %s: %s", type(error).__name__, error)
            return [None]


def over_grid(grid: Grid, loaded: Loaded, check: Callable[[], None] = lambda: None) -> OverGrid:
    """The transport of a run over a grid; a simulated one keeps its processes by itself."""
    config = loaded.config
    resident = config.flower.resident and not isinstance(grid, InMemoryGrid)
    errand = Errand(as_tree(config), identity(loaded), resident)
    return OverGrid(grid, errand, config.flower, loaded.bench.layout, check)


def _introduction(message: Message | None) -> tuple[tuple[int, int] | None, str]:
    """Read (partition, partitions) from a node's answer, or say what is wrong with it."""
    if message is None:
        return None, "did not introduce itself"
    if not message.has_content():
        return None, _error_of(message)
    record = message.content.get("node")
    if not isinstance(record, ConfigRecord):
        return None, "introduced itself in another language"
    part, parts = record.get("partition"), record.get("partitions")
    if not (isinstance(part, int) and isinstance(parts, int) and 0 <= part < parts):
        return None, "has no partition-id and num-partitions in its node configuration"
    return (part, parts), ""


def _size(message: Message | None) -> int | None:
    return framed_bytes(message.content) if message and message.has_content() else None


def _error_of(message: Message) -> str:
    """What an error reply says; Flower sends some itself, in place of a node that is gone."""
    if not message.has_error():
        return "answered with nothing"
    return error_reason(message.error.code, message.error.reason or "")


def _bytes_of(layout: Layout) -> int:
    return sum(4 * math.prod(shape) for _, shape in layout.values())
