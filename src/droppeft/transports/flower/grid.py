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
from droppeft.messages import AdapterSpec, Failure, Instruction, Layout, Reply
from droppeft.transports.base import Arrival
from droppeft.transports.flower.messenger import DeliveryError, Messenger, NotSent
from droppeft.transports.flower.nodes import Directory
from droppeft.transports.flower.records import framed_bytes, packed_of, record_of
from droppeft.transports.flower.strict_json import Malformed
from droppeft.transports.flower.wire_format import RunContext, pack_instruction, unpack_reply

BYTES_PER_ARRAY = 200
"""Most that safetensors needs to describe one."""


@dataclass
class OverGrid:
    """instructions as messages to nodes, replies as they come.

    Attributes:
        post: the grid.
        directory: which node serves which client.
        errand: what a client needs beside its instruction.
        clients: all clients of the run; the first exchange waits until each has a node.
        settings: deadlines.
        layout: the tensors of an instruction's adapter, which bound the size of a reply.
        check: called while waiting; raises when no reply can come any more.
    """

    messenger: Messenger
    directory: Directory
    run_context: RunContext
    clients: int
    settings: FlowerConfig
    layout: Callable[[AdapterSpec], Layout]
    check: Callable[[], None] = lambda: None
    _begun: bool = False

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        """Yield failures to send, replies in order of arrival, and who did not reply in time."""
        if not self._begun:
            self.directory.find(range(self.clients), self.settings.nodes_timeout_s, self.check)
            self._begun = True
        nodes = self.directory.find(
            [instruction.client for instruction in instructions], 0.0, self.check
        )
        waiting: dict[str, tuple[int, int]] = {}
        for index, instruction in enumerate(instructions):
            try:
                name, size = self._send(instruction, nodes.get(instruction.client))
            except NotSent as error:
                yield Arrival(index, Failure(instruction.client, str(error)), 0, 0)
            else:
                waiting[name] = index, size
        yield from self._replies(instructions, waiting)

    def _send(self, instruction: Instruction, node: int | None) -> tuple[str, int]:
        """Send one instruction; return the name of its reply and its bytes."""
        if node is None:
            raise NotSent(f"no node serves this client ({self.directory.problem})")
        record = record_of(pack_instruction(instruction, self.run_context))
        size = framed_bytes(record)
        name = self.messenger.send(
            record, node, "train", str(instruction.round), self.settings.deadline_s
        )
        return name, size

    def _replies(
        self, instructions: Sequence[Instruction], waiting: dict[str, tuple[int, int]]
    ) -> Iterator[Arrival]:
        start = time.monotonic()
        while waiting and time.monotonic() - start < self.settings.deadline_s:
            self.check()
            for name, answer in self.messenger.fetch(waiting):
                index, sent = waiting.pop(name)
                size = 0 if isinstance(answer, DeliveryError) else framed_bytes(answer.content)
                yield Arrival(index, self._reply(instructions[index], answer), sent, size)
            if waiting:
                time.sleep(_pause_s(time.monotonic() - start))
        for index, sent in waiting.values():
            reason = f"no reply within {self.settings.deadline_s:g} s"
            yield Arrival(index, Failure(instructions[index].client, reason), sent, 0)

    def _reply(self, instruction: Instruction, answer: Message | DeliveryError) -> Reply:
        if isinstance(answer, DeliveryError):
            return Failure(instruction.client, answer.reason)
        try:
            return unpack_reply(
                packed_of(answer.content), _most_bytes(self.layout(instruction.adapter))
            )
        except Malformed as error:
            return Failure(instruction.client, f"refused: {error}")


def over_grid(grid: Grid, loaded: Loaded, check: Callable[[], None] = lambda: None) -> OverGrid:
    """The transport of a run over a grid; a simulated one keeps its processes by itself."""
    config, messenger = loaded.config, Messenger(grid)
    model_server = config.flower.model_server and not isinstance(grid, InMemoryGrid)
    return OverGrid(
        messenger=messenger,
        directory=Directory(messenger),
        run_context=RunContext(as_tree(config), identity(loaded), model_server),
        clients=config.clients,
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
