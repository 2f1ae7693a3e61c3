"""FedSA-LoRA: devices share LoRA's A and the head, and keep B to themselves.

Source: arXiv:2410.01463. B is never merged, so there is no global model: what each device has is
measured on its own test rows, and a device that never trained has B = 0.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.federated_method import (
    Method,
    Setup,
    average_by_examples,
    for_each,
    full_plan,
    measuring,
    start_with,
    uniform_adapter,
)
from droppeft.messages import Plan, Reply, ServerState, flatten, restrict
from droppeft.sharing.factors import B
from droppeft.sharing.participation import (
    ParticipationMemory,
    last_participation,
    with_participations,
)


def _check(config: Config) -> None:
    if config.adapter.type != "lora":
        raise DroppeftError(
            f"method=fedsa_lora shares LoRA's A; adapter.type={config.adapter.type} has none, "
            "leave it out"
        )


def _init(setup: Setup) -> ServerState:
    return replace(start_with(setup, uniform_adapter(setup)), memory=ParticipationMemory())


def _of_device(setup: Setup, state: ServerState, round: int, device: int) -> Plan:
    plan, last = full_plan(setup, state, round, device), last_participation(state, device)
    shared = frozenset(name for _, name, _ in flatten(plan.tensors) if B not in name)
    if last is None:
        return replace(plan, share=shared)
    return replace(plan, tensors=restrict(plan.tensors, shared), share=shared, kept=last.round)


def _merge(
    setup: Setup, state: ServerState, plans: Sequence[Plan], replies: Sequence[Reply]
) -> ServerState:
    return with_participations(average_by_examples(setup, state, plans, replies), plans, replies)


FEDSA_LORA = Method(
    name="fedsa_lora",
    summary="LoRA's A and the head are shared, B stays on the device (FedSA-LoRA)",
    tables=frozenset({"frozen", "server"}),
    init=_init,
    plan=for_each(_of_device),
    merge=_merge,
    check=_check,
    own=measuring(_of_device),
    has_global_model=lambda config: False,
    memory_type=ParticipationMemory,
)
