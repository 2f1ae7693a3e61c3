"""Send and fetch messages over a Flower grid one by one, so that each has an error of its own."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import httpx
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from droppeft.errors import DroppeftError
from droppeft.transports.flower.records import MOST_REASON, error_reason
from droppeft.transports.flower.wire_format import one_line

INTERRUPTED = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)
"""Errors after which a client may have been interrupted."""

_log = logging.getLogger("droppeft")


class NotSent(DroppeftError):
    """A message could not be sent."""


@dataclass(frozen=True)
class Node:
    """A connected node.

    Attributes:
        id: Flower's id of it.
        public_key: the key with which it has proved itself to the SuperLink, as PEM.
        name: under which it is registered, or empty.
        since: when it connected; a node that connects again is another one.
    """

    id: int
    public_key: bytes = b""
    name: str = ""
    since: str = ""

    def __str__(self) -> str:
        name = one_line(self.name, MOST_REASON)
        return f"node {name} ({self.id})" if name else f"node {self.id}"


@dataclass(frozen=True)
class DeliveryError:
    """Stands for a reply that could not be delivered.

    Attributes:
        reason: why, in one sentence.
        interrupted: whether the client may have been interrupted; it could be asked again.
    """

    reason: str
    interrupted: bool = False


@dataclass(frozen=True)
class Messenger:
    """Sends and fetches messages, so that an error in one does not affect the others.

    Attributes:
        grid: Flower's grid.
        simulated: whether the texts of errors come from this machine, and are shown.
    """

    grid: Grid
    simulated: bool = False

    def nodes(self) -> frozenset[Node]:
        """Return the connected nodes; none while the SuperLink cannot be reached."""
        try:
            found = list(self.grid.get_nodes())
            return frozenset(
                Node(one.node_id, one.public_key, one.name, one.last_activated_at) for one in found
            )
        except httpx.HTTPError as error:
            _log.warning("the SuperLink cannot be reached: %s", error)
            return frozenset()

    def send(self, content: RecordDict, node: int, kind: str, group: str, ttl_s: float) -> str:
        """Send a message and return the name under which its reply can be fetched.

        Args:
            content: of the message.
            node: id of the receiver.
            kind: Flower's message type, such as ``"train"``.
            group: Flower's group id.
            ttl_s: seconds after which Flower discards message and reply.

        Raises:
            NotSent: it could not be sent.
        """
        message = Message(content, dst_node_id=node, message_type=kind, ttl=ttl_s, group_id=group)
        try:
            names = list(self.grid.push_messages([message]))
        except Exception as error:
            raise NotSent(f"could not be sent: {type(error).__name__}: {error}") from error
        # Flower returns an empty list or None for a message that it does not accept.
        if not names or not names[0]:
            raise NotSent("could not be sent: Flower did not accept the message")
        return names[0]

    def fetch(self, names: Iterable[str]) -> Iterator[tuple[str, Message | DeliveryError]]:
        """Yield the replies of the given names that have arrived.

        Each is fetched with a call of its own, because a reply that Flower cannot read would hide
        the others of the same call.
        """
        for name in list(names):
            try:
                messages = list(self.grid.pull_messages([name]))
            except httpx.HTTPError as error:
                _log.warning("the SuperLink cannot be reached: %s", error)
                continue
            except Exception as error:
                reason = f"its reply could not be read: {type(error).__name__}: {error}"
                yield name, DeliveryError(reason)
                continue
            for message in messages:
                yield name, message if message.has_content() else self._error_of(message)

    def _error_of(self, message: Message) -> DeliveryError:
        """The reason in an error reply, which may come from the node or from Flower itself."""
        if not message.has_error():
            return DeliveryError("its reply is empty")
        code, text = message.error.code, message.error.reason if self.simulated else None
        return DeliveryError(error_reason(code, text), code in INTERRUPTED)
