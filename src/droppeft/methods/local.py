"""Local: every device trains an adapter of its own and shares nothing: a lower reference. Ours.

All begin from the same values, which a device's first Plan brings. There is no global model: what
a device has learnt is measured on its own test rows.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.methods.base import (
    Method,
    Setup,
    full_plan,
    start_with,
    uniform_adapter,
    without_steps,
)
from droppeft.plans import Plan, Reply, ServerState
from droppeft.sharing.visits import last_visit, with_visits


def _init(setup: Setup) -> ServerState:
    return start_with(setup, uniform_adapter(setup))


def _plan(setup: Setup, state: ServerState, round: int, cohort: Sequence[int]) -> list[Plan]:
    return [_of_device(setup, state, round, device) for device in cohort]


def _of_device(setup: Setup, state: ServerState, round: int, device: int) -> Plan:
    plan = full_plan(setup, state, round, device, dropout=None)
    visit = last_visit(state, device)
    tensors = plan.tensors if visit is None else {}
    kept = None if visit is None else visit.round
    return replace(plan, tensors=tensors, share=frozenset(), kept=kept)


def _merge(
    setup: Setup, state: ServerState, plans: Sequence[Plan], replies: Sequence[Reply]
) -> ServerState:
    return with_visits(state, plans, replies)


def _own(setup: Setup, state: ServerState, round: int, device: int) -> Plan:
    return without_steps(_of_device(setup, state, round, device))


LOCAL = Method(
    name="local",
    summary="every device by itself, nothing shared: a lower reference",
    tables=frozenset({"frozen"}),
    init=_init,
    plan=_plan,
    merge=_merge,
    own=_own,
    has_global_model=lambda config: False,
)
