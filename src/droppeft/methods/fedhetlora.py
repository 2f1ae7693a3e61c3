"""FedHetLoRA: clients have LoRA of different ranks, which they prune themselves.

Source: HetLoRA (arXiv:2401.06432). A client gets the global matrices cut to its rank, trains with a
penalty on the last part of its ranks, and loses that part when training made its norm smaller; the
server pads with zeros and weighs an update by the Frobenius norm of its product B·A. Ours where the
paper is silent: ranks between a quarter of ``adapter.rank`` (the slowest kind of client) and all of
it (the fastest), in equal shares by seed where all are of one kind; nobody is pruned below that
quarter; the factor alpha / rank stays that of the full rank, so that cutting changes nothing but
what is cut off; one norm per update, over all its matrices; if all products are zero, updates are
weighed by their rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from droppeft import seeds
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.federated_method import (
    Method,
    Setup,
    evaluating,
    for_each,
    full_instruction,
    start_with,
    uniform_adapter,
)
from droppeft.messages import (
    AdapterSpec,
    Array,
    GlobalModel,
    Instruction,
    LayerKey,
    RankPenalty,
    Reply,
    ServerState,
    Tensors,
    Update,
)
from droppeft.sharing.aggregation import average_over_holders, by_examples
from droppeft.sharing.factors import A, B, pairs_of

LEAST_PART = 1 / 4
"""Of the full rank, on the slowest clients."""

PENALTY, KEPT_PART = 1e-3, 0.9
"""Weight of the penalty, and the part of a client's ranks that it spares. The paper's are tuned in
1e-6 to 1e-3 and .85 to 1."""


@dataclass(frozen=True)
class Ranks:
    """The state's memory.

    Attributes:
        ranks: of each client.
    """

    ranks: tuple[int, ...]


def resized(tensors: Tensors, rank: int) -> Tensors:
    """Cut LoRA's matrices to a rank or pad them with zeros; other tensors stay."""
    return {
        key: {name: _resized(name, value, rank) for name, value in named.items()}
        for key, named in tensors.items()
    }


def _resized(name: str, value: Array, rank: int) -> Array:
    axis = 0 if A in name else 1 if B in name else None  # A is (r, in), B is (out, r)
    if axis is None:
        return value
    shape = list(value.shape)
    shape[axis] = rank
    made = np.zeros(shape, value.dtype)
    kept = tuple(slice(min(a, b)) for a, b in zip(shape, value.shape, strict=True))
    made[kept] = value[kept]
    return made


def product_norm(tensors: Tensors) -> float:
    """Frobenius norm of all products B·A together."""
    return math.sqrt(sum(_square(a, b) for a, b in _pairs(tensors)))


def _square(a: Array, b: Array) -> float:
    """||B·A||² is the sum of (BᵀB)∘(AAᵀ), which is small."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return max(0.0, float(((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum()))


def _pairs(tensors: Tensors) -> list[tuple[Array, Array]]:
    return [(tensors[key][a], tensors[key][b]) for key, a, b in pairs_of(tensors)]


def tail_norm(tensors: Tensors, kept: int) -> float:
    """Sum over all matrices of ||B[:, kept:]||·||A[kept:]||, which the penalty makes small."""
    return sum(
        float(np.linalg.norm(b[:, kept:]) * np.linalg.norm(a[kept:])) for a, b in _pairs(tensors)
    )


def first_ranks(setup: Setup, full: int) -> Ranks:
    """The rank with which each client begins."""
    count = setup.config.clients
    least = _least(full)
    speeds = _speeds(setup)
    if len(set(speeds)) > 1:
        low, high = min(speeds), max(speeds)
        return Ranks(
            tuple(round(least + (full - least) * (speed - low) / (high - low)) for speed in speeds)
        )
    order = seeds.numpy_generator(setup.config.seed, purpose="ranks").permutation(count)
    choices = (least, (least + full) // 2, full)
    return Ranks(tuple(choices[place % len(choices)] for place in order))


def _speeds(setup: Setup) -> list[float]:
    if setup.clock is None:
        return [1.0] * setup.config.clients
    fleet = setup.clock.fleet
    return [
        math.log(fleet.profile(client).effective_flops_per_s)
        for client in range(setup.config.clients)
    ]


def _check(config: Config) -> None:
    chosen = config.adapter
    if chosen.type != "lora" or chosen.rank is None:
        raise DroppeftError(
            f"method=fedhetlora cuts LoRA's matrices to ranks, and adapter.type={chosen.type}; "
            "set adapter.type=lora"
        )
    if chosen.options.get("use_rslora"):
        raise DroppeftError(
            "method=fedhetlora keeps alpha / rank alike on all clients, and use_rslora divides by "
            "the root of the rank; leave adapter.options.use_rslora out"
        )


def _init(setup: Setup) -> ServerState:
    state = start_with(setup, uniform_adapter(setup))
    return replace(state, memory=first_ranks(setup, setup.config.adapter.rank or 0))


def _with_penalty(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    instruction = at_rank(setup, state, round, client)
    least = _least(setup.config.adapter.rank or 0)
    penalty = RankPenalty(PENALTY, _kept(_ranks(state)[client], least))
    return replace(instruction, objective=replace(instruction.objective, rank_penalty=penalty))


def at_rank(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    """The instruction most methods begin from, cut to the rank that the state's memory has of a
    client.
    """
    instruction, rank = full_instruction(setup, state, round, client), _ranks(state)[client]
    return replace(
        instruction,
        adapter=_cut(instruction.adapter, rank),
        tensors=resized(instruction.tensors, rank),
    )


def _cut(full: AdapterSpec, rank: int) -> AdapterSpec:
    """An adapter of a smaller rank with the same alpha / rank."""
    whole = max(layer.rank or 0 for layer in full.layers if layer)
    layers = tuple(replace(layer, rank=rank) if layer else None for layer in full.layers)
    alpha = None if full.alpha is None else full.alpha * rank / whole
    return replace(full, layers=layers, alpha=alpha)


def _kept(rank: int, least: int) -> int:
    """Ranks that the penalty spares; of the least rank all."""
    return max(least, math.floor(KEPT_PART * rank))


def _least(full: int) -> int:
    """The rank below which nobody begins or is pruned; the paper's r_min."""
    return max(1, math.ceil(LEAST_PART * full))


def _ranks(state: ServerState) -> tuple[int, ...]:
    memory: Ranks = state.memory
    return memory.ranks


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    full = setup.config.adapter.rank or 0
    ranks, updates = list(_ranks(state)), []
    for instruction, reply in zip(instructions, replies, strict=True):
        if isinstance(reply, Update):
            rank = _pruned(
                ranks[instruction.client], _least(full), instruction.tensors, reply.tensors
            )
            ranks[instruction.client] = rank
            tensors = resized(resized(reply.tensors, rank), full)
            updates.append(replace(reply, tensors=tensors))
    norms = {update.client: product_norm(update.tensors) for update in updates}

    def by_norm(update: Update, layer: LayerKey) -> float:
        return norms[update.client]

    weight = by_norm if any(norms.values()) else by_examples
    tensors = average_over_holders(state.model.tensors, updates, weight)
    model = GlobalModel(state.model.adapter, tensors, state.model.base_delta)
    return replace(state, model=model, memory=Ranks(tuple(ranks)))


def _pruned(rank: int, least: int, sent: Tensors, trained: Tensors) -> int:
    """The rank after a turn: without its last part if training made that smaller."""
    kept = _kept(rank, least)
    return kept if tail_norm(trained, kept) < tail_norm(sent, kept) else rank


FEDHETLORA = Method(
    name="fedhetlora",
    summary="LoRA of each client's own rank, pruned by itself (HetLoRA)",
    tables=frozenset({"frozen"}),
    init=_init,
    instruct=for_each(_with_penalty),
    merge=_merge,
    check=_check,
    evaluate_client=evaluating(at_rank),
    memory_type=Ranks,
)
