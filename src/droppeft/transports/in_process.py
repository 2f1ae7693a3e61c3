"""Clients run in the server's own process, one after another."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from droppeft.client.client import Client
from droppeft.client.run_inputs import Loaded, clients_of
from droppeft.messages import Plan
from droppeft.transports.base import Arrival, Transport


@dataclass(frozen=True)
class InProcess:
    """All clients, on one frozen backbone.

    Attributes:
        clients: by number.
    """

    clients: Sequence[Client]

    def exchange(self, plans: Sequence[Plan]) -> Iterator[Arrival]:
        """Yield each client's reply, in the order of the Plans."""
        for index, plan in enumerate(plans):
            yield Arrival(index, self.clients[plan.device].run(plan))


def in_process(loaded: Loaded) -> AbstractContextManager[Transport]:
    """Run clients here, on the server's own backbone."""
    return nullcontext(InProcess(clients_of(loaded)))
