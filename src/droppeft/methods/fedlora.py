"""FedLoRA: LoRA in every layer at full depth, A and B averaged separately, weighted by rows.

Source: FedIT (arXiv:2305.05644), with the classification setting of FedPETuning.
"""

from collections.abc import Sequence

from droppeft.methods.base import (
    Method,
    Setup,
    average_by_examples,
    full_plan,
    start_with,
    uniform_adapter,
)
from droppeft.plans import Plan, ServerState


def _init(setup: Setup) -> ServerState:
    return start_with(setup, uniform_adapter(setup))


def _plan(setup: Setup, state: ServerState, round: int, cohort: Sequence[int]) -> list[Plan]:
    return [full_plan(setup, state, round, device, dropout=None) for device in cohort]


FEDLORA = Method(
    name="fedlora",
    summary="LoRA in every layer, full depth, plain averaging (FedIT)",
    tables=frozenset({"frozen", "server"}),
    init=_init,
    plan=_plan,
    merge=average_by_examples,
)
