"""Messages over a Flower grid, one by one: what fails is said of the message that it is about."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from droppeft.errors import DroppeftError
from droppeft.transports.flower.records import error_reason

_log = logging.getLogger("droppeft")


class NotSent(DroppeftError):
    """A message that did not leave."""


@dataclass(frozen=True)
class DeliveryError:
    """What came instead of a reply.

    Attributes:
        reason: one sentence.
    """

    reason: str


@dataclass(frozen=True)
class Messenger:
    """A grid, used so that one bad message harms no other.

    Attributes:
        grid: Flower's.
    """

    grid: Grid

    def nodes(self) -> frozenset[int]:
        """Ids of the connected nodes; none while the SuperLink cannot be reached."""
        try:
            return frozenset(self.grid.get_node_ids())
        except httpx.HTTPError as error:
            _log.warning("the SuperLink cannot be reached: %s", error)
            return frozenset()

    def send(self, content: RecordDict, node: int, kind: str, group: str, ttl_s: float) -> str:
        """Send and return the name under which the reply can be fetched.

        Raises:
            Unsent: with the reason.
        """
        message = Message(content, dst_node_id=node, message_type=kind, ttl=ttl_s, group_id=group)
        try:
            names = list(self.grid.push_messages([message]))
        except Exception as error:
            raise NotSent(f"could not be sent: {type(error).__name__}: {error}") from error
        # Flower returns nothing, or None, for a message that it does not take.
        if not names or not names[0]:
            raise NotSent("could not be sent: Flower did not take the message")
        return names[0]

    def fetch(self, names: Iterable[str]) -> Iterator[tuple[str, Message | DeliveryError]]:
        """Yield what has come by now for the given names.

        Each is fetched by itself, since one that Flower cannot read would hide the others.
        """
        for name in list(names):
            try:
                came = list(self.grid.pull_messages([name]))
            except httpx.HTTPError as error:
                _log.warning("the SuperLink cannot be reached: %s", error)
                continue
            except Exception as error:
                reason = f"its reply could not be read: {type(error).__name__}: {error}"
                yield name, DeliveryError(reason)
                continue
            for message in came:
                yield name, message if message.has_content() else DeliveryError(_error_of(message))


def _error_of(message: Message) -> str:
    """What an error reply says; Flower sends some itself, in place of a node that is gone."""
    if not message.has_error():
        return "answered with nothing"
    return error_reason(message.error.code, message.error.reason)
