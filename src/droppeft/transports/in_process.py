"""The transport that runs clients in the server's process, one after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from droppeft.client.client import Client
from droppeft.client.site import RefusingSite
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Reply
from droppeft.refusals import Refused
from droppeft.transports.base import Arrival


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
            yield Arrival(index, self.reply(instruction))

    def reply(self, instruction: Instruction) -> Reply:
        """Run the client of an instruction, and return what it answers."""
        try:
            return self.clients[instruction.client].run(instruction)
        except Refused as error:
            return Failure.of(instruction.client, error)
