"""FlexLoRA: ranks that fit the clients, and products that are averaged instead of factors.

Source: arXiv:2402.11505. The server averages B·A, factors the mean again by SVD and sends every
client as many of the largest components as its rank holds. The ranks are those that `fedhetlora`
begins with, so that what differs is the merge; the factor alpha / rank stays that of the full rank.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.federated_method import (
    Method,
    Setup,
    evaluating,
    for_each,
    start_with,
    uniform_adapter,
)
from droppeft.messages import Instruction, Reply, ServerState, Update
from droppeft.methods.fedhetlora import Ranks, at_rank, first_ranks, resized
from droppeft.methods.plain_lora import check_plain_lora
from droppeft.sharing.aggregation import by_examples
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
    tensors = average_products(state.model.tensors, updates, by_examples)
    return replace(state, model=replace(state.model, tensors=tensors))


FLEXLORA = Method(
    name="flexlora",
    summary="LoRA of each client's own rank, products averaged and factored again (FlexLoRA)",
    tables=frozenset({"frozen"}),
    init=_init,
    instruct=for_each(at_rank),
    merge=_merge,
    check=check_plain_lora,
    evaluate_client=evaluating(at_rank),
    memory_type=Ranks,
)
