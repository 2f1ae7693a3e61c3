"""Ditto: FedLoRA, and beside it on every device a whole adapter of its own, pulled to it.

Source: arXiv:2012.04221, with one pass over the same batches for either, the shared adapter first.
The own adapter is what personalised accuracy measures; a device that never trained has the shared.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.federated_method import (
    Method,
    Setup,
    average_by_examples,
    for_each,
    full_plan,
    start_with,
    uniform_adapter,
    without_steps,
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
    last = last_participation(state, device)
    return replace(
        full_plan(setup, state, round, device),
        kept=None if last is None else last.round,
        own_copy=setup.config.ditto.pull,
    )


def _merge(
    setup: Setup, state: ServerState, plans: Sequence[Plan], replies: Sequence[Reply]
) -> ServerState:
    return with_participations(average_by_examples(setup, state, plans, replies), plans, replies)


def _own(setup: Setup, state: ServerState, round: int, device: int) -> Plan:
    plan = _of_device(setup, state, round, device)
    return without_steps(plan if plan.kept is None else replace(plan, tensors={}))


DITTO = Method(
    name="ditto",
    summary="FedLoRA, and an adapter of each device's own, pulled to the shared one (Ditto)",
    tables=frozenset({"ditto", "server"}),
    init=_init,
    plan=for_each(_of_device),
    merge=_merge,
    own=_own,
    memory_type=ParticipationMemory,
)
