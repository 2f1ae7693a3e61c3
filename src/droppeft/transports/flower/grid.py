"""Flower as the transport: our round loop over any of its grids.

Flower's own strategies are not used: they send everybody the same, want the same keys back from
all, and cannot resume (docs/decisions/0002).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from droppeft.client.run_inputs import Loaded, identity
from droppeft.config import FlowerConfig, as_tree
from droppeft.messages import AdapterSpec, Failure, Layout, Plan, Reply
from droppeft.transports.base import Arrival
from droppeft.transports.flower.messenger import Post, Trouble, Unsent
from droppeft.transports.flower.nodes import Directory
from droppeft.transports.flower.records import framed_bytes, packed_of, record_of
from droppeft.transports.flower.strict_json import Malformed
from droppeft.transports.flower.wire_format import Errand, pack_plan, unpack_reply

BYTES_PER_ARRAY = 200
"""Most that safetensors needs to describe one."""


@dataclass
class OverGrid:
    """Plans as messages to nodes, replies as they come.

    Attributes:
        post: the grid.
        directory: which node serves which device.
        errand: what a device needs beside its Plan.
        devices: all devices of the run; the first exchange waits until each has a node.
        settings: deadlines.
        layout: the tensors of a Plan's adapter, which bound the size of a reply.
        check: called while waiting; raises when no reply can come any more.
    """

    post: Post
    directory: Directory
    errand: Errand
    devices: int
    settings: FlowerConfig
    layout: Callable[[AdapterSpec], Layout]
    check: Callable[[], None] = lambda: None
    _begun: bool = False

    def exchange(self, plans: Sequence[Plan]) -> Iterator[Arrival]:
        """Yield failures to send, replies in order of arrival, and who did not reply in time."""
        if not self._begun:
            self.directory.find(range(self.devices), self.settings.nodes_timeout_s, self.check)
            self._begun = True
        nodes = self.directory.find([plan.device for plan in plans], 0.0, self.check)
        waiting: dict[str, tuple[int, int]] = {}
        for index, plan in enumerate(plans):
            try:
                name, size = self._send(plan, nodes.get(plan.device))
            except Unsent as error:
                yield Arrival(index, Failure(plan.device, str(error)), 0, 0)
            else:
                waiting[name] = index, size
        yield from self._replies(plans, waiting)

    def _send(self, plan: Plan, node: int | None) -> tuple[str, int]:
        """Send one Plan; return the name of its reply and its bytes."""
        if node is None:
            raise Unsent(f"no node serves this device ({self.directory.trouble})")
        record = record_of(pack_plan(plan, self.errand))
        size = framed_bytes(record)
        name = self.post.send(record, node, "train", str(plan.round), self.settings.deadline_s)
        return name, size

    def _replies(
        self, plans: Sequence[Plan], waiting: dict[str, tuple[int, int]]
    ) -> Iterator[Arrival]:
        start = time.monotonic()
        while waiting and time.monotonic() - start < self.settings.deadline_s:
            self.check()
            for name, answer in self.post.fetch(waiting):
                index, sent = waiting.pop(name)
                size = 0 if isinstance(answer, Trouble) else framed_bytes(answer.content)
                yield Arrival(index, self._reply(plans[index], answer), sent, size)
            if waiting:
                time.sleep(_pause_s(time.monotonic() - start))
        for index, sent in waiting.values():
            reason = f"no reply within {self.settings.deadline_s:g} s"
            yield Arrival(index, Failure(plans[index].device, reason), sent, 0)

    def _reply(self, plan: Plan, answer: Message | Trouble) -> Reply:
        if isinstance(answer, Trouble):
            return Failure(plan.device, answer.reason)
        try:
            return unpack_reply(packed_of(answer.content), _most_bytes(self.layout(plan.adapter)))
        except Malformed as error:
            return Failure(plan.device, f"refused: {error}")


def over_grid(grid: Grid, loaded: Loaded, check: Callable[[], None] = lambda: None) -> OverGrid:
    """The transport of a run over a grid; a simulated one keeps its processes by itself."""
    config, post = loaded.config, Post(grid)
    resident = config.flower.resident and not isinstance(grid, InMemoryGrid)
    return OverGrid(
        post=post,
        directory=Directory(post),
        errand=Errand(as_tree(config), identity(loaded), resident),
        devices=config.devices,
        settings=config.flower,
        layout=loaded.model.layout,
        check=check,
    )


def _pause_s(waited_s: float) -> float:
    """Ask again soon after a short wait and seldom after a long one: at most 2 % are lost."""
    return min(max(0.02, 0.02 * waited_s), 1.0)


def _most_bytes(layout: Layout) -> int:
    """What a reply with all of an adapter's tensors has."""
    values = sum(4 * math.prod(shape) for _, shape in layout.values())
    return values + BYTES_PER_ARRAY * (len(layout) + 1)
