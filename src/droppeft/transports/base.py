"""The interface between server and clients: carry instructions to clients, and replies back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from droppeft.client.run_inputs import Loaded
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply


@dataclass(frozen=True)
class Arrival:
    """A reply, as the transport hands it to the server.

    Attributes:
        index: of the instruction that it replies to. The transport knows it from its own
            addressing, not from the content of the reply.
        reply: what the client sent, or a failure if nothing arrived.
    """

    index: int
    reply: Reply


class Transport(Protocol):
    """Carries the instructions of a round to clients, and replies back."""

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        """Yield one arrival per instruction, in any order."""


Connect = Callable[[Loaded], AbstractContextManager[Transport]]
"""Opens the transport of a run; leaving the context closes it."""
