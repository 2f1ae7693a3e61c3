"""Local: every device trains an adapter of its own and shares nothing: a lower reference. Ours.

All begin from the same values, which a device's first Plan brings. There is no global model: what
a device has learnt is measured on its own test rows.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.federated_method import (
    Method,
    Setup,
    for_each,
    full_plan,
    measuring,
    start_with,
    uniform_adapter,
)
from droppeft.messages import Plan, Reply, ServerState
from droppeft.sharing.participation import (
    ParticipationMemory,
    last_participation,
    with_participations,
)


def _init(setup: Setup) -> ServerState:
    return replace(start_with(setup, uniform_adapter(setup)), memory=ParticipationMemory())


def _of_device(setup: Setup, state: ServerState, round: int, device: int) -> Plan:
    plan = full_plan(setup, state, round, device)
    last = last_participation(state, device)
    tensors = plan.tensors if last is None else {}
    kept = None if last is None else last.round
    return replace(plan, tensors=tensors, share=frozenset(), kept=kept)


def _merge(
    setup: Setup, state: ServerState, plans: Sequence[Plan], replies: Sequence[Reply]
) -> ServerState:
    return with_participations(state, plans, replies)


LOCAL = Method(
    name="local",
    summary="every device by itself, nothing shared: a lower reference",
    tables=frozenset({"frozen"}),
    init=_init,
    plan=for_each(_of_device),
    merge=_merge,
    own=measuring(_of_device),
    has_global_model=lambda config: False,
    memory_type=ParticipationMemory,
)
