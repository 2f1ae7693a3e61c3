"""Find the Flower node that serves a client; nodes themselves report which clients they serve."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict

from droppeft.transports.flower.messenger import DeliveryError, Messenger, NotSent

_log = logging.getLogger("droppeft")

INTRODUCTION_S = 600.0
"""Seconds after which Flower discards a query to a node that does not reply."""


@dataclass
class Directory:
    """The nodes that have reported which clients they serve.

    A node with ``partition-id`` p of ``num-partitions`` n serves the clients c with c mod n = p, so
    any number of nodes can serve any number of clients. A node that reconnects may have another
    id. If several connected nodes serve a client, the one that reported last is used.

    Attributes:
        messenger: reaches the nodes.
        problem: the last reason why a node serves no client.
    """

    messenger: Messenger
    problem: str = "none is connected"
    _parts: dict[int, tuple[int, int]] = field(default_factory=dict)
    _unusable: set[int] = field(default_factory=set)
    _asked: dict[str, int] = field(default_factory=dict)

    def find(
        self, clients: Collection[int], wait_s: float, check: Callable[[], None]
    ) -> Mapping[int, int]:
        """Find a connected node for each client.

        Args:
            clients: whose nodes to find.
            wait_s: seconds to wait for clients that have no node yet.
            check: called while waiting; may raise an error.

        Returns:
            Node id by client, without clients that have no node.
        """
        end = time.monotonic() + wait_s
        failed: set[int] = set()
        while True:
            check()
            connected = self.messenger.nodes()
            self._ask(connected - self._parts.keys() - self._unusable - failed)
            failed |= self._receive()
            nodes = self._serving(clients, connected)
            if len(nodes) == len(set(clients)) or time.monotonic() >= end:
                return nodes
            time.sleep(0.1)

    def _serving(self, clients: Collection[int], connected: Collection[int]) -> dict[int, int]:
        """The connected node of each client that has one."""
        present = [(node, part) for node, part in self._parts.items() if node in connected]
        return {
            client: node
            for node, (part, parts) in present
            for client in clients
            if client % parts == part
        }

    def _ask(self, nodes: Collection[int]) -> None:
        """Ask nodes which clients they serve, except those whose reply is still expected."""
        waiting = set(self._asked.values())
        for node in sorted(set(nodes) - waiting):
            try:
                name = self.messenger.send(
                    RecordDict(), node, "query", "introduction", INTRODUCTION_S
                )
            except NotSent as error:
                self._note(node, str(error))
            else:
                self._asked[name] = node

    def _receive(self) -> set[int]:
        """Read the replies of nodes; return the nodes that failed, which may be asked again."""
        failed = set()
        for name, message in self.messenger.fetch(self._asked):
            node = self._asked.pop(name)
            if isinstance(message, DeliveryError):
                failed.add(node)
                self._note(node, message.reason)
                continue
            part = _part_of(message)
            if part is None:
                self._unusable.add(node)
                self._note(node, "no partition-id and num-partitions in its node configuration")
            else:
                self._parts[node] = part
        return failed

    def _note(self, node: int, reason: str) -> None:
        self.problem = f"node {node}: {reason}"
        _log.warning("node %d serves no client: %s", node, reason)


def _part_of(message: Message) -> tuple[int, int] | None:
    """Read (partition, partitions) from a node's reply; ``None`` if it has none."""
    record = message.content.get("node")
    if not isinstance(record, ConfigRecord):
        return None
    part, parts = record.get("partition"), record.get("partitions")
    if isinstance(part, int) and isinstance(parts, int) and 0 <= part < parts:
        return part, parts
    return None
