"""What the server remembers of each device's last turn that counted; ours.

Its round names what the device kept then and begins with next; its shared layers are what the next
Plan brings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from droppeft.plans import Failure, Plan, Reply, ServerState, Update
from droppeft.sharing.criteria import CRITERIA

VISITS, CHOICES, NORMS = "visits", "choices", "gradient_norms"


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
    visits, choices, norms = (dict(_table(state, name)) for name in (VISITS, CHOICES, NORMS))
    for plan, reply in zip(plans, replies, strict=True):
        device = str(plan.device)
        if isinstance(reply, Update):
            visits[device] = plan.round
            if reply.shared is not None:
                choices[device] = list(reply.shared)
            if plan.sharing is not None and CRITERIA[plan.sharing.criterion].compares:
                norms[device] = list(reply.importance)
        elif isinstance(reply, Failure) and reply.lost:
            visits.pop(device, None)  # without it a choice is not looked at
    tables = {VISITS: visits, CHOICES: choices, NORMS: norms}
    others = {key: item for key, item in state.memory.items() if key not in tables}
    known = {name: table for name, table in tables.items() if table}
    return replace(state, memory={**others, **known})


def norms_of_devices(state: ServerState) -> list[Sequence[float]]:
    """Gradient norms by layer of each device's last turn, for criteria that compare with them."""
    return list(_table(state, NORMS).values())


def _table(state: ServerState, key: str) -> Mapping[str, Any]:
    found = state.memory.get(key, {})
    assert isinstance(found, Mapping)
    return found
