"""How instructions reach clients and replies come back: the seam between server and clients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from droppeft.client.run_inputs import Loaded
from droppeft.messages import Instruction, Reply


@dataclass(frozen=True)
class Arrival:
    """A reply as the transport hands it over.

    Attributes:
        index: which of the instructions it answers, by the transport's own addressing.
        reply: what came back, or why nothing did.
        sent_bytes, received_bytes: what was sent for it and back, framing included; ``None``
            where nothing was framed.
    """

    index: int
    reply: Reply
    sent_bytes: int | None = None
    received_bytes: int | None = None


class Transport(Protocol):
    """Whatever carries a round's instructions to clients."""

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        """Yield one arrival per instruction, in any order; the round closes after the last."""


Connect = Callable[[Loaded], AbstractContextManager[Transport]]
"""Opens a transport for a run; leaving the context closes it."""
