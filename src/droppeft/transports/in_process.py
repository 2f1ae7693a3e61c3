"""The transport that runs clients in the server's process, one after another."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from droppeft.client.client import Client
from droppeft.client.run_inputs import Loaded, clients_of
from droppeft.client.site import RefusingSite
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Reply
from droppeft.refusals import Refused
from droppeft.transports.base import Arrival, Transport


@dataclass(frozen=True)
class InProcess:
    """Runs all clients on one shared backbone.

    Attributes:
        clients: of the run, by number.
    """

    clients: Sequence[Client | RefusingSite]

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        """Run each client and yield its reply, in the order of the instructions."""
        for index, instruction in enumerate(instructions):
            yield Arrival(index, self._reply(instruction))

    def _reply(self, instruction: Instruction) -> Reply:
        try:
            return self.clients[instruction.client].run(instruction)
        except Refused as error:
            return Failure.of(instruction.client, error)


def in_process(loaded: Loaded) -> AbstractContextManager[Transport]:
    """Open the transport; clients share the server's backbone."""
    return nullcontext(InProcess(clients_of(loaded)))
