"""What the server remembers of each device's last turn that counted; ours.

Its round names what the device kept then and begins with next; its shared layers are what the next
Plan brings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from droppeft.plans import Failure, Plan, Reply, ServerState, Update

VISITS, CHOICES = "visits", "choices"


@dataclass(frozen=True)
class Visit:
    """A device's last turn that was merged.

    Attributes:
        round: of that turn.
        shared: layers that are shared since; ``None`` where there was no choice.
    """

    round: int
    shared: tuple[int, ...] | None


def last_visit(state: ServerState, device: int) -> Visit | None:
    """Of a device; ``None`` before its first, or if it lost what it had kept then."""
    round = _table(state, VISITS).get(str(device))
    if round is None:
        return None
    choice = _table(state, CHOICES).get(str(device))
    return Visit(round, None if choice is None else tuple(choice))


def with_visits(state: ServerState, plans: Sequence[Plan], replies: Sequence[Reply]) -> ServerState:
    """Note a round's merged turns, and who has lost what it kept."""
    visits, choices = dict(_table(state, VISITS)), dict(_table(state, CHOICES))
    for plan, reply in zip(plans, replies, strict=True):
        device = str(plan.device)
        if isinstance(reply, Update):
            visits[device] = plan.round
            if reply.shared is not None:
                choices[device] = list(reply.shared)
        elif isinstance(reply, Failure) and reply.lost:
            visits.pop(device, None)  # without it a choice is not looked at
    tables = {name: table for name, table in ((VISITS, visits), (CHOICES, choices)) if table}
    others = {key: item for key, item in state.memory.items() if key not in (VISITS, CHOICES)}
    return replace(state, memory={**others, **tables})


def _table(state: ServerState, key: str) -> Mapping[str, Any]:
    found = state.memory.get(key, {})
    assert isinstance(found, Mapping)
    return found
