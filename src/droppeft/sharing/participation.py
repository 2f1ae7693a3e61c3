"""The server's memory of each client's last participation, that is, its last merged update.

The round of the last participation identifies the state that the client saved and continues from.
The layers that it shared then are the ones that the next instruction brings. Ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Reply, Update
from droppeft.messages.server_state import ServerState
from droppeft.sharing.criteria import CRITERIA


@dataclass(frozen=True)
class Participation:
    """A local training of a client whose update was merged.

    Attributes:
        round: the round.
        shared: the layers that the client has shared since; ``None`` without a sharing rule.
    """

    round: int
    shared: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ParticipationMemory:
    """Memory of a method whose clients save state.

    Attributes:
        participations: each client's last participation. A client that lost its state has none.
        gradient_norms: gradient norms by layer of each client's last participation, if the
            criterion compares clients.
    """

    participations: Mapping[int, Participation] = field(default_factory=dict)
    gradient_norms: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


def last_participation(state: ServerState, client: int) -> Participation | None:
    """Return a client's last participation; ``None`` if it had none or has lost its state."""
    memory: ParticipationMemory = state.memory
    return memory.participations.get(client)


def with_participations(
    state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    """Return the state in which the merged updates and the lost states of a round are recorded."""
    memory: ParticipationMemory = state.memory
    participations, norms = dict(memory.participations), dict(memory.gradient_norms)
    for instruction, reply in zip(instructions, replies, strict=True):
        if isinstance(reply, Update):
            participations[instruction.client] = Participation(instruction.round, reply.shared)
            if instruction.sharing is not None and CRITERIA[instruction.sharing.criterion].compares:
                norms[instruction.client] = reply.importance
        elif isinstance(reply, Failure) and reply.lost:
            participations.pop(instruction.client, None)
    updated = replace(memory, participations=participations, gradient_norms=norms)
    return replace(state, memory=updated)


def norms_of_clients(state: ServerState) -> list[Sequence[float]]:
    """Return the gradient norms by layer of all clients, for criteria that compare clients."""
    memory: ParticipationMemory = state.memory
    return list(memory.gradient_norms.values())
