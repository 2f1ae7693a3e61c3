"""FlexLoRA: each client has its own LoRA rank, and the products B·A are averaged, not the factors.

Source: arXiv:2402.11505. The server averages B·A, factorises the mean by SVD and sends each client
the largest components, as many as its rank. Ours: the ranks are the initial ranks of `fedhetlora`,
so that the two methods differ in merging only, and the factor alpha / rank stays that of the full
rank.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.federated_method import (
    Method,
    Setup,
    evaluating,
    per_client,
    start_with,
    uniform_adapter,
)
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import ServerState
from droppeft.methods.fedhetlora import Ranks, at_rank, check_rule, first_ranks, resized
from droppeft.sharing.aggregation import by_targets
from droppeft.sharing.factors import average_products


def _init(setup: Setup) -> ServerState:
    rank = setup.config.adapter.rank or 0
    state = start_with(setup, uniform_adapter(setup))
    return replace(state, memory=first_ranks(setup, rank))


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    full = setup.config.adapter.rank or 0
    updates = [
        replace(reply, tensors=resized(reply.tensors, full))
        for reply in replies
        if isinstance(reply, Update)
    ]
    tensors = average_products(state.model.tensors, updates, by_targets)
    return replace(state, model=replace(state.model, tensors=tensors))


FLEXLORA = Method(
    name="flexlora",
    summary="LoRA with a rank per client, products averaged and factorised again (FlexLoRA)",
    tables=frozenset({"frozen"}),
    init=_init,
    instruct=per_client(at_rank),
    merge=_merge,
    check=check_rule,
    lora_options=frozenset(),
    evaluate_client=evaluating(at_rank),
    memory_type=Ranks,
)
