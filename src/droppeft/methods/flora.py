"""FLoRA: each round's products are added to the frozen weights; the next round has fresh factors.

Source: arXiv:2409.05976. The paper sends the stacked factors of all clients, whose product is
exactly the sum of the clients' products. Ours: the server sends that sum as a change of the frozen
weights, since a client that does not train in every round would need the stacks of all rounds that
it missed, which soon are larger than the weights. All clients have the same rank, and the head is
averaged.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from droppeft import seeds
from droppeft.federated_method import Method, Setup
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import GlobalModel, ServerState
from droppeft.messages.tensors import Array, LayerKey, Tensors
from droppeft.methods.fedlora import FEDLORA
from droppeft.methods.plain_lora import check_exact_weights, scale_of, with_added
from droppeft.sharing.aggregation import average_over_senders, by_targets
from droppeft.sharing.factors import mean_products, pairs_of


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    updates = [reply for reply in replies if isinstance(reply, Update)]
    if not updates:
        return state
    model = state.model
    products = mean_products(model.tensors, updates, by_targets)
    tensors = average_over_senders(model.tensors, updates, by_targets)
    delta = with_added(model.base_delta, products, scale_of(setup.config))
    fresh = _with_fresh_factors(setup, tensors, updates[0].round)
    return replace(state, model=GlobalModel(model.adapter, fresh, delta))


def _with_fresh_factors(setup: Setup, tensors: Tensors, round: int) -> Tensors:
    """The tensors with a new A, which differs from round to round, and with B = 0.

    A is drawn as PEFT draws it: uniformly, with variance 1 / (3 * in_features).
    """
    rng = seeds.numpy_generator(setup.config.seed, purpose="fresh factors", round=round)
    result: dict[LayerKey, dict[str, Array]] = {key: dict(named) for key, named in tensors.items()}
    for key, a, b in pairs_of(tensors):
        shape = result[key][a].shape
        bound = 1 / np.sqrt(shape[1])
        result[key][a] = rng.uniform(-bound, bound, shape).astype(np.float32)
        result[key][b] = np.zeros_like(result[key][b])
    return result


FLORA = Method(
    name="flora",
    summary="each round's LoRA is added to the frozen weights, without error (FLoRA)",
    tables=frozenset(),
    init=FEDLORA.init,
    instruct=FEDLORA.instruct,
    merge=_merge,
    check=check_exact_weights,
    lora_options=frozenset(),
)
