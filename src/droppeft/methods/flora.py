"""FLoRA: every round's products go into the frozen weights, and the next begins with fresh factors.

Source: arXiv:2409.05976, which stacks the clients' factors: the product of the stacks is the sum of
the products, without error. Here the server sends that sum as a change of the frozen weights, since
a client that comes back after some rounds would need the stacks of all of them, which are soon
larger than the weights. All clients have the same rank; the head is averaged.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from droppeft import seeds
from droppeft.federated_method import (
    Method,
    Setup,
)
from droppeft.messages import (
    Array,
    GlobalModel,
    Instruction,
    LayerKey,
    Reply,
    ServerState,
    Tensors,
    Update,
)
from droppeft.methods.fedlora import FEDLORA
from droppeft.methods.plain_lora import check_added_lora, scale_of, with_added
from droppeft.sharing.aggregation import average_over_holders, by_examples
from droppeft.sharing.factors import mean_products, pairs_of


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    updates = [reply for reply in replies if isinstance(reply, Update)]
    if not updates:
        return state
    model = state.model
    products = mean_products(model.tensors, updates, by_examples)
    tensors = average_over_holders(model.tensors, updates, by_examples)
    delta = with_added(model.base_delta, products, scale_of(setup.config))
    begun = _begun_again(setup, tensors, updates[0].round)
    return replace(state, model=GlobalModel(model.adapter, begun, delta))


def _begun_again(setup: Setup, tensors: Tensors, round: int) -> Tensors:
    """Fresh A, other ones every round, and B of zeros; all else as it is.

    A is drawn as peft draws it: uniform, with variance 1 / (3 in).
    """
    rng = seeds.numpy_generator(setup.config.seed, purpose="fresh factors", round=round)
    made: dict[LayerKey, dict[str, Array]] = {key: dict(named) for key, named in tensors.items()}
    for key, a, b in pairs_of(tensors):
        shape = made[key][a].shape
        bound = 1 / np.sqrt(shape[1])
        made[key][a] = rng.uniform(-bound, bound, shape).astype(np.float32)
        made[key][b] = np.zeros_like(made[key][b])
    return made


FLORA = Method(
    name="flora",
    summary="every round's LoRA goes into the frozen weights, without error (FLoRA)",
    tables=frozenset(),
    init=FEDLORA.init,
    instruct=FEDLORA.instruct,
    merge=_merge,
    check=check_added_lora,
)
