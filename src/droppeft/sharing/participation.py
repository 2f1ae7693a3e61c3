"""What the server remembers of each client's last participation that counted; ours.

Its round names what the client kept then and begins with next; its shared layers are what the next
instruction brings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from droppeft.messages import Failure, Instruction, Reply, ServerState, Update
from droppeft.sharing.criteria import CRITERIA


@dataclass(frozen=True)
class Participation:
    """A client's local training that was merged.

    Attributes:
        round: in which it was.
        shared: layers that are shared since; ``None`` where there was no choice.
    """

    round: int
    shared: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ParticipationMemory:
    """The memory of a method whose clients keep something.

    Attributes:
        participations: each client's last one; none of a client that lost what it had kept then.
        gradient_norms: by layer, of each client's last local training, for criteria that compare
            with them.
    """

    participations: Mapping[int, Participation] = field(default_factory=dict)
    gradient_norms: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


def last_participation(state: ServerState, client: int) -> Participation | None:
    """Of a client; ``None`` before its first, or if it lost what it had kept then."""
    memory: ParticipationMemory = state.memory
    return memory.participations.get(client)


def with_participations(
    state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    """Note whose updates a round merged, and who has lost what it kept."""
    memory: ParticipationMemory = state.memory
    participations, norms = dict(memory.participations), dict(memory.gradient_norms)
    for instruction, reply in zip(instructions, replies, strict=True):
        if isinstance(reply, Update):
            participations[instruction.client] = Participation(instruction.round, reply.shared)
            if instruction.sharing is not None and CRITERIA[instruction.sharing.criterion].compares:
                norms[instruction.client] = reply.importance
        elif isinstance(reply, Failure) and reply.lost:
            participations.pop(instruction.client, None)
    known = replace(memory, participations=participations, gradient_norms=norms)
    return replace(state, memory=known)


def norms_of_clients(state: ServerState) -> list[Sequence[float]]:
    """Gradient norms by layer, for criteria that compare with them."""
    memory: ParticipationMemory = state.memory
    return list(memory.gradient_norms.values())
