"""Clients run in the server's own process, one after another."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from droppeft.client.client import Client
from droppeft.client.run_inputs import Loaded, clients_of
from droppeft.messages import Instruction
from droppeft.transports.base import Arrival, Transport


@dataclass(frozen=True)
class InProcess:
    """All clients, on one frozen backbone.

    Attributes:
        clients: by number.
    """

    clients: Sequence[Client]

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        """Yield each client's reply, in the order of the instructions."""
        for index, instruction in enumerate(instructions):
            yield Arrival(index, self.clients[instruction.client].run(instruction))


def in_process(loaded: Loaded) -> AbstractContextManager[Transport]:
    """Run clients here, on the server's own backbone."""
    return nullcontext(InProcess(clients_of(loaded)))
