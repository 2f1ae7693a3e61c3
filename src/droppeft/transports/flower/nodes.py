"""Which of Flower's nodes serves which client: nodes say so themselves."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict

from droppeft.transports.flower.messenger import DeliveryError, Messenger, NotSent

_log = logging.getLogger("droppeft")

INTRODUCTION_S = 600.0
"""How long Flower keeps the question to a node that does not answer."""


@dataclass
class Directory:
    """The nodes that have introduced themselves.

    A node with ``partition-id`` p of ``num-partitions`` n serves the clients d with d mod n = p,
    so that any number of nodes serves any number of clients. Ids of nodes mean nothing, and one
    that comes back may have another. Of several that serve a client the last met is taken.

    Attributes:
        post: how they are reached.
        trouble: the last reason for which a node serves nothing.
    """

    messenger: Messenger
    problem: str = "none is connected"
    _parts: dict[int, tuple[int, int]] = field(default_factory=dict)
    _useless: set[int] = field(default_factory=set)
    _asked: dict[str, int] = field(default_factory=dict)

    def find(
        self, clients: Collection[int], wait_s: float, check: Callable[[], None]
    ) -> Mapping[int, int]:
        """Find a connected node for each client.

        Args:
            clients: whose node is wanted.
            wait_s: how long to wait for those that are missing.
            check: called while waiting; may raise.
        """
        end = time.monotonic() + wait_s
        failed: set[int] = set()
        while True:
            check()
            connected = self.messenger.nodes()
            self._ask(connected - self._parts.keys() - self._useless - failed)
            failed |= self._listen()
            found = self._serving(clients, connected)
            if len(found) == len(set(clients)) or time.monotonic() >= end:
                return found
            time.sleep(0.1)

    def _serving(self, clients: Collection[int], connected: Collection[int]) -> dict[int, int]:
        present = [(node, part) for node, part in self._parts.items() if node in connected]
        return {
            client: node
            for node, (part, parts) in present
            for client in clients
            if client % parts == part
        }

    def _ask(self, nodes: Collection[int]) -> None:
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

    def _listen(self) -> set[int]:
        """Hear who has answered; return those that failed to, who may be asked again later."""
        failed = set()
        for name, answer in self.messenger.fetch(self._asked):
            node = self._asked.pop(name)
            if isinstance(answer, DeliveryError):
                failed.add(node)
                self._note(node, answer.reason)
                continue
            part = _part_of(answer)
            if part is None:
                self._useless.add(node)
                self._note(node, "no partition-id and num-partitions in its node configuration")
            else:
                self._parts[node] = part
        return failed

    def _note(self, node: int, reason: str) -> None:
        self.problem = f"node {node}: {reason}"
        _log.warning("node %d serves no client: %s", node, reason)


def _part_of(message: Message) -> tuple[int, int] | None:
    """Read (partition, partitions) from a node's answer, ``None`` if it has none."""
    record = message.content.get("node")
    if not isinstance(record, ConfigRecord):
        return None
    part, parts = record.get("partition"), record.get("partitions")
    if isinstance(part, int) and isinstance(parts, int) and 0 <= part < parts:
        return part, parts
    return None
