"""FFA-LoRA: A stays what the seed made it, only B and the head are trained and travel.

Source: arXiv:2403.12313. With one A for all, mean(B)·A is mean(B·A): averaging is exact, and A
does not travel.
"""

from dataclasses import replace

from droppeft.federated_method import (
    Method,
    Setup,
    average_by_examples,
    for_each,
    full_plan,
    measuring,
)
from droppeft.messages import Plan, ServerState, flatten, restrict
from droppeft.methods.fedlora import FEDLORA
from droppeft.methods.plain_lora import check_plain_lora
from droppeft.sharing.factors import A


def _of_device(setup: Setup, state: ServerState, round: int, device: int) -> Plan:
    """Every device makes A itself, from the seed."""
    plan = full_plan(setup, state, round, device)
    names = frozenset(name for _, name, _ in flatten(plan.tensors) if A not in name)
    return replace(plan, tensors=restrict(plan.tensors, names), train=names, share=names)


FFA_LORA = Method(
    name="ffa_lora",
    summary="LoRA with A frozen: B and the head are trained and shared (FFA-LoRA)",
    tables=frozenset({"frozen", "server"}),
    init=FEDLORA.init,
    plan=for_each(_of_device),
    merge=average_by_examples,
    check=check_plain_lora,
    own=measuring(_of_device),
)
