"""Find the Flower node of each client: one node is one client. Ours.

A node says which client it is. If the public keys of the clients are known, the key with which the
node has proved itself to the SuperLink must be that client's.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict

from droppeft.quantities import counted
from droppeft.transports.flower.messenger import DeliveryError, Messenger, Node, NotSent

_log = logging.getLogger("droppeft")

INTRODUCTION_S = 600.0
"""Seconds after which Flower discards a query to a node that does not reply."""

MOST_NAMED = 5
"""Most clients without a node that are named at once."""


@dataclass
class Directory:
    """The nodes that have said which client they are.

    Of several connected nodes that say that they are the same client, the first remains the
    client's node and the others are refused. A node that connects again is asked again.

    Attributes:
        messenger: reaches the nodes.
        clients: number of clients of the run.
        keys: the client of each public key, in the form in which Flower hands it on; ``None``
            takes the nodes' word for which client they are.
        say: tells the operator of the server a sentence.
        patience_s: seconds for which a node that was asked is expected to say which client it is,
            and after which one that failed is asked again.
    """

    messenger: Messenger
    clients: int
    keys: Mapping[bytes, int] | None = None
    say: Callable[[str], None] = _log.info
    patience_s: float = 20.0
    _claims: dict[Node, int] = field(default_factory=dict)
    _refusals: dict[Node, str] = field(default_factory=dict)
    _failures: dict[Node, str] = field(default_factory=dict)
    _asked: dict[str, Node] = field(default_factory=dict)
    _asked_at: dict[Node, float] = field(default_factory=dict)
    _nodes: dict[int, Node] = field(default_factory=dict)
    _left: dict[int, str] = field(default_factory=dict)

    def wait_for(self, clients: Collection[int], wait_s: float, check: Callable[[], None]) -> None:
        """Wait until each client has a connected node.

        Args:
            clients: whose nodes to wait for.
            wait_s: seconds to wait at most.
            check: called while waiting; may raise an error.
        """
        start = said = time.monotonic()
        named: Sequence[int] = ()
        while True:
            check()
            missing = sorted({*clients} - self.find(clients).keys())
            now = time.monotonic()
            if not missing or now - start >= wait_s:
                return
            if now - said > 2.0 and missing != named:
                self.say(f"waiting at most {wait_s:.0f} s for nodes: {self.missing(missing)}")
                named = missing
            time.sleep(0.1)

    def find(self, clients: Collection[int]) -> Mapping[int, int]:
        """Find a connected node for each client, without waiting.

        Returns:
            Node id by client, without clients that have no node.
        """
        connected = self.messenger.nodes()
        self._forget(connected)
        failed_of_late = {node for node in self._failures if self._was_asked_of_late(node)}
        self._ask(
            connected - {*self._claims, *self._refusals, *self._asked.values(), *failed_of_late}
        )
        self._receive()
        self._assign(connected)
        return {client: self._nodes[client].id for client in clients if client in self._nodes}

    def expects(self, client: int) -> bool:
        """Whether a node that was asked a short time ago may be the client's."""
        return any(
            self._client_of(node) in (client, None) and self._was_asked_of_late(node)
            for node in self._asked.values()
        )

    def missing(self, clients: Collection[int]) -> str:
        """Name the clients that have no node, with the reasons; empty if all have one."""
        without = sorted({*clients} - self._nodes.keys())
        parts = [f"client {client} ({self.reason(client)})" for client in without[:MOST_NAMED]]
        if len(without) > MOST_NAMED:
            parts.append(f"{counted(len(without) - MOST_NAMED, 'other client')}")
        return ", ".join(parts)

    def reason(self, client: int) -> str:
        """Say why a client has no node, and since when."""
        since = f"its node left at {self._left[client]}" if client in self._left else ""
        silent = dict.fromkeys(self._asked.values(), "has not said which client it is")
        problems = {**silent, **self._failures, **self._refusals}
        others = [
            f"{node} {problems[node]}"
            for possible in (client, None)  # None: nobody knows which client that node is
            for node in problems
            if self._client_of(node) == possible
        ]
        return "; ".join(part for part in (since, *others[:1]) if part) or "none has connected"

    def _was_asked_of_late(self, node: Node) -> bool:
        return time.monotonic() - self._asked_at[node] < self.patience_s

    def _client_of(self, node: Node) -> int | None:
        """The client that a node is by its key, or that it says it is."""
        return (self.keys or {}).get(node.public_key, self._claims.get(node))

    def _forget(self, connected: Collection[Node]) -> None:
        """Forget nodes that have left."""
        for client, node in list(self._nodes.items()):
            if node not in connected:
                del self._nodes[client]
                self._left[client] = time.strftime("%H:%M:%S")
        for known in (self._claims, self._refusals, self._failures, self._asked_at):
            for node in known.keys() - connected:
                del known[node]
        self._asked = {name: node for name, node in self._asked.items() if node in connected}

    def _ask(self, nodes: Collection[Node]) -> None:
        """Ask nodes which client they are, except those whose keys are unknown."""
        for node in sorted(nodes, key=lambda node: node.id):
            if self.keys is not None and node.public_key not in self.keys:
                self._refuse(node, "is refused: its key is none of the clients' (client_keys)")
                continue
            try:
                name = self.messenger.send(
                    RecordDict(), node.id, "query", "introduction", INTRODUCTION_S
                )
            except NotSent as error:
                _log.warning("%s: %s", node, error)
            else:
                self._asked[name] = node
                self._asked_at[node] = time.monotonic()

    def _receive(self) -> None:
        """Read the replies of nodes."""
        for name, message in self.messenger.fetch(self._asked):
            node = self._asked.pop(name)
            if isinstance(message, DeliveryError):
                self._failures[node] = f"did not say which client it is: {message.reason}"
                self.say(f"{node} {self._failures[node]}")
                continue
            self._failures.pop(node, None)
            client = _client_of(message)
            if client is None:
                self._refuse(node, "is refused: it does not say which client it is")
            elif client >= self.clients:
                self._refuse(
                    node,
                    f"is refused: it says that it is client {client}, and the run has clients 0 "
                    f"to {self.clients - 1}",
                )
            elif self.keys is not None and client != self.keys[node.public_key]:
                self._refuse(
                    node,
                    f"is refused: it says that it is client {client}, and its key is that of "
                    f"client {self.keys[node.public_key]}",
                )
            else:
                self._claims[node] = client

    def _assign(self, connected: Collection[Node]) -> None:
        """Give every client without a node the first node that says that it is this client."""
        for node, client in list(self._claims.items()):
            holder = self._nodes.setdefault(client, node)
            if holder == node:
                self._refusals.pop(node, None)
                if self._left.pop(client, None):
                    self.say(f"client {client} has a node again")
            elif node not in self._refusals:
                self._refuse(
                    node, f"is refused: it says that it is client {client}, which {holder} is"
                )

    def _refuse(self, node: Node, reason: str) -> None:
        self._refusals[node] = reason
        self.say(f"{node} {reason}")


def _client_of(message: Message) -> int | None:
    """Read the number of a client from a node's reply; ``None`` if it has none."""
    record = message.content.get("node")
    client = record.get("client") if isinstance(record, ConfigRecord) else None
    return client if isinstance(client, int) and client >= 0 else None
