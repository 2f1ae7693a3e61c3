"""FedEx-LoRA: A and B are averaged, and the error of that is added to the frozen weights.

Source: arXiv:2410.09432. The residual mean(B·A) - mean(B)·mean(A) is added to the adapted weights,
so that the global model is the exact mean. Ours: clients get the sum of the residuals of all rounds
so far, since a client that does not train in every round has missed some of them.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from droppeft.adapters.tensor_names import LORA_A, LORA_B
from droppeft.federated_method import Method, Setup
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import GlobalModel, ServerState
from droppeft.messages.tensors import flatten
from droppeft.methods.fedlora import FEDLORA
from droppeft.methods.plain_lora import check_exact_weights, scale_of, with_added
from droppeft.sharing.aggregation import Wide, average_over_senders, by_targets
from droppeft.sharing.factors import mean_products


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    updates = [reply for reply in replies if isinstance(reply, Update)]
    if not updates:
        return state
    model = state.model
    tensors = average_over_senders(model.tensors, updates, by_targets)
    averaged = {name: array for _, name, array in flatten(tensors)}

    def residual(a: str, mean: Wide) -> Wide:
        """Mean of the products less the product of the averaged factors that clients get."""
        up, down = averaged[a.replace(LORA_A, LORA_B)], averaged[a]
        return mean - up.astype(np.float64) @ down.astype(np.float64)

    means = mean_products(model.tensors, updates, by_targets)
    residuals = ((a, residual(a, mean)) for a, mean in means)
    delta = with_added(model.base_delta, residuals, scale_of(setup.config))
    return replace(state, model=GlobalModel(model.adapter, tensors, delta))


FEDEX_LORA = Method(
    name="fedex_lora",
    summary="A and B averaged, the error of that added to the frozen weights (FedEx-LoRA)",
    tables=frozenset(),
    init=FEDLORA.init,
    instruct=FEDLORA.instruct,
    merge=_merge,
    check=check_exact_weights,
    lora_options=frozenset(),
)
