"""FedEx-LoRA: factors are averaged, and what that gets wrong goes into the frozen weights.

Source: arXiv:2410.09432. The residual mean(B·A) - mean(B)·mean(A) is added to the weights behind
it, so that the global model is the exact mean. Here devices get the sum of the residuals so far:
one that comes back after some rounds has missed some.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from droppeft.methods.base import Method, Setup, full_plan, start_with, uniform_adapter
from droppeft.methods.plain_lora import check_plain_lora, scale_of, with_added
from droppeft.plans import GlobalModel, Plan, Reply, ServerState, Tensors, Update
from droppeft.sharing.aggregation import average_over_holders, by_examples
from droppeft.sharing.factors import Wide, mean_products, pairs_of


def _init(setup: Setup) -> ServerState:
    check_plain_lora(setup.config, exact=True)
    return start_with(setup, uniform_adapter(setup))


def _plan(setup: Setup, state: ServerState, round: int, cohort: Sequence[int]) -> list[Plan]:
    return [full_plan(setup, state, round, device, dropout=None) for device in cohort]


def _merge(
    setup: Setup, state: ServerState, plans: Sequence[Plan], replies: Sequence[Reply]
) -> ServerState:
    updates = [reply for reply in replies if isinstance(reply, Update)]
    if not updates:
        return state
    model = state.model
    tensors = average_over_holders(model.tensors, updates, by_examples)
    means, averaged = mean_products(model.tensors, updates, by_examples), _products(tensors)
    residual = {a: mean - averaged[a] for a, mean in means.items()}
    delta = with_added(model.base_delta, residual, scale_of(setup.config))
    return replace(state, model=GlobalModel(model.adapter, tensors, delta))


def _products(tensors: Tensors) -> dict[str, Wide]:
    """B·A of the factors as devices get them, by the name of A."""
    return {
        a: tensors[key][b].astype(np.float64) @ tensors[key][a].astype(np.float64)
        for key, a, b in pairs_of(tensors)
    }


FEDEX_LORA = Method(
    name="fedex_lora",
    summary="A and B averaged, the error of that put into the frozen weights (FedEx-LoRA)",
    tables=frozenset(),
    init=_init,
    plan=_plan,
    merge=_merge,
)
