"""The transport over Flower: instructions and replies as messages on any Flower grid.

Flower's strategies are not used: they send the same message to all clients, expect the same keys
from all, and cannot resume a run (docs/decisions/0002-flower-and-adapters.md).
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from droppeft.client.published_task import published
from droppeft.client.run_inputs import Loaded, identity
from droppeft.client.site_config import published_settings
from droppeft.config import Config, FlowerConfig, as_tree
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import AdapterSpec, Instruction
from droppeft.messages.reply import Failure, Reply
from droppeft.messages.tensors import Layout
from droppeft.transports.base import Arrival
from droppeft.transports.flower.keys import read_public_keys
from droppeft.transports.flower.messenger import DeliveryError, Messenger, NotSent
from droppeft.transports.flower.nodes import Directory
from droppeft.transports.flower.records import packed_of, record_of
from droppeft.transports.flower.wire_format import (
    Malformed,
    RunContext,
    pack_instruction,
    unpack_reply,
)

BYTES_PER_ARRAY = 200
"""Upper bound of what safetensors needs to describe one array."""

RECONNECT_S = 120.0
"""Seconds that a round waits for a node that was lost in it."""

_log = logging.getLogger("droppeft")


@dataclass
class OverGrid:
    """Sends instructions as messages to nodes, and yields replies as they arrive.

    Attributes:
        messenger: sends and fetches messages.
        directory: knows which node serves which client.
        run_context: what a client needs beside its instruction.
        clients: number of clients of the run; those without a node are named in each exchange.
        settings: deadlines.
        layout: the tensors of an instruction's adapter, which bound the size of a reply.
        check: called while waiting; raises an error if no reply can arrive any more.
        simulated: whether clients are processes of this machine, whose errors are shown in full.
    """

    messenger: Messenger
    directory: Directory
    run_context: RunContext
    clients: int
    settings: FlowerConfig
    layout: Callable[[AdapterSpec], Layout]
    check: Callable[[], None] = lambda: None
    simulated: bool = False

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        """Send instructions; yield replies as they arrive, then failures for missing ones."""
        nodes = self.directory.find([instruction.client for instruction in instructions])
        if missing := self.directory.missing(range(self.clients)):
            self.directory.say(f"without a node: {missing}")
        waiting: dict[str, int] = {}
        lost = _WithoutNode()
        for index, instruction in enumerate(instructions):
            client = instruction.client
            if client not in nodes and self.directory.expects(client):
                lost.add(index, self._no_node(client), self.directory.patience_s)
                continue
            try:
                name = self._send(instruction, nodes.get(instruction.client))
            except NotSent as error:
                yield Arrival(index, Failure(instruction.client, str(error)))
            else:
                waiting[name] = index
        yield from self._replies(instructions, waiting, lost)

    def _send(self, instruction: Instruction, node: int | None) -> str:
        """Send one instruction; return the name of its reply."""
        if node is None:
            raise NotSent(self._no_node(instruction.client))
        record = record_of(pack_instruction(instruction, self.run_context))
        return self.messenger.send(
            record, node, "train", str(instruction.round), self.settings.deadline_s
        )

    def _no_node(self, client: int) -> str:
        return f"it has no node ({self.directory.reason(client)})"

    def _replies(
        self, instructions: Sequence[Instruction], waiting: dict[str, int], lost: "_WithoutNode"
    ) -> Iterator[Arrival]:
        """Yield one arrival for each reply in ``waiting``, an index by the reply's name."""
        start = time.monotonic()
        while (waiting or lost) and time.monotonic() - start < self.settings.deadline_s:
            self.check()
            for name, message in self.messenger.fetch(waiting):
                index = waiting.pop(name)
                if isinstance(message, DeliveryError) and lost.takes(index, message):
                    continue
                yield Arrival(index, self._reply(instructions[index], message))
            for index, reason in lost.ended():
                yield Arrival(index, Failure(instructions[index].client, reason))
            waiting |= self._sent_again(instructions, lost)
            if waiting or lost:
                time.sleep(_pause_s(time.monotonic() - start))
        for index in (*waiting.values(), *lost.waiting):
            reason = f"no reply within {self.settings.deadline_s:g} s"
            yield Arrival(index, Failure(instructions[index].client, reason))

    def _sent_again(
        self, instructions: Sequence[Instruction], lost: "_WithoutNode"
    ) -> dict[str, int]:
        """Send instructions whose clients have a node now."""
        if not lost:
            return {}
        clients = {instructions[index].client: index for index in lost.waiting}
        sent = {}
        for client, node in self.directory.find(clients).items():
            with suppress(NotSent):  # otherwise it is tried again
                sent[self._send(instructions[clients[client]], node)] = clients[client]
                del lost.waiting[clients[client]]
        return sent

    def _reply(self, instruction: Instruction, message: Message | DeliveryError) -> Reply:
        if isinstance(message, DeliveryError):
            return Failure(instruction.client, message.reason)
        try:
            reply = unpack_reply(
                packed_of(message.content),
                _most_bytes(self.layout(instruction.adapter)),
                simulated=self.simulated,
            )
        except Malformed as error:
            return Failure(instruction.client, f"refused: {error}")
        if isinstance(reply, Failure):
            return dataclasses.replace(reply, client=instruction.client)
        return reply


class _WithoutNode:
    """Instructions whose clients may have a node soon.

    The node has not yet said which client it is, or it was lost, or its process ended, while it
    worked. In the latter cases the client is asked once more. An instruction has the same result
    whenever it is run, so the run is as it would have been.

    Attributes:
        waiting: for each instruction, when the round stops waiting for a node, and the reason.
    """

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[float, str]] = {}
        self._again: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def add(self, index: int, reason: str, wait_s: float) -> None:
        """Note an instruction that waits some seconds for a node."""
        self.waiting[index] = (time.monotonic() + wait_s, reason)

    def takes(self, index: int, error: DeliveryError) -> bool:
        """Note an error if the client may be asked again; return whether it may."""
        if not error.interrupted or index in self._again:
            return False
        self._again.add(index)
        self.add(index, error.reason, RECONNECT_S)
        return True

    def ended(self) -> list[tuple[int, str]]:
        """Remove and return those whose clients have had no node for too long, with the reason."""
        now = time.monotonic()
        late = [(index, reason) for index, (end, reason) in self.waiting.items() if end < now]
        for index, _ in late:
            del self.waiting[index]
        return late


def over_grid(
    grid: Grid,
    loaded: Loaded,
    check: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = _log.info,
) -> OverGrid:
    """Make the transport of a run over a grid: of a SuperLink, or of a simulation.

    Waits ``flower.nodes_timeout_s`` at most until each client has a node.

    Raises:
        DroppeftError: the clients' public keys cannot be read, or the grid is simulated.
    """
    config, simulated = loaded.config, isinstance(grid, InMemoryGrid)
    messenger = Messenger(grid, simulated)
    run_context = (
        RunContext(as_tree(config), identity=identity(loaded))
        if simulated
        else RunContext(
            published_settings(config),
            published(config.task, loaded.data.label_names, loaded.backbone),
            model_server=config.flower.model_server,
        )
    )
    directory = Directory(messenger, config.clients, _client_keys(config, simulated), say)
    directory.wait_for(range(config.clients), config.flower.nodes_timeout_s, check)
    return OverGrid(
        messenger=messenger,
        directory=directory,
        run_context=run_context,
        clients=config.clients,
        settings=config.flower,
        layout=loaded.model.layout,
        check=check,
        simulated=simulated,
    )


def _client_keys(config: Config, simulated: bool) -> Mapping[bytes, int] | None:
    """The client of each public key, if there is a folder of them."""
    folder = config.flower.client_keys
    if folder is not None and simulated:
        raise DroppeftError("flower.client_keys is for a SuperLink; leave it out in a simulation")
    return None if folder is None else read_public_keys(Path(folder).expanduser())


def _pause_s(waited_s: float) -> float:
    """Seconds until the next fetch: 2 % of the time waited so far, between 0.02 and 1."""
    return min(max(0.02, 0.02 * waited_s), 1.0)


def _most_bytes(layout: Layout) -> int:
    """Upper bound of the size of a reply that has all tensors of an adapter."""
    values = sum(4 * math.prod(shape) for _, shape in layout.values())
    return values + BYTES_PER_ARRAY * (len(layout) + 1)
