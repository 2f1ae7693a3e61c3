"""Which turn of each device counted last: what it kept then is what it begins with next. Ours."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from droppeft.plans import Failure, Plan, Reply, ServerState, Update

VISITS = "visits"


def last_visit(state: ServerState, device: int) -> int | None:
    """The round of a device's last turn that was merged; ``None`` before it, or if it lost that."""
    return _visits(state).get(str(device))


def with_visits(state: ServerState, plans: Sequence[Plan], replies: Sequence[Reply]) -> ServerState:
    """Note a round's merged turns, and who has lost what it kept."""
    visits = dict(_visits(state))
    for plan, reply in zip(plans, replies, strict=True):
        if isinstance(reply, Update):
            visits[str(plan.device)] = plan.round
        elif isinstance(reply, Failure) and reply.lost:
            visits.pop(str(plan.device), None)
    if visits == _visits(state):
        return state
    return replace(state, memory={**state.memory, VISITS: visits})


def _visits(state: ServerState) -> Mapping[str, int]:
    found = state.memory.get(VISITS, {})
    assert isinstance(found, Mapping)
    return found
