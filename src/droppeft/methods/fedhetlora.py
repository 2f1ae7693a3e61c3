"""FedHetLoRA: each client has its own LoRA rank, which is pruned during the run.

From the paper (HetLoRA, arXiv:2401.06432): a client gets the global matrices truncated to its rank
and trains with a penalty on its last ranks. If training made the norm of these ranks smaller, they
are pruned. The server pads the matrices with zeros and weights an update by the Frobenius norm of
its product B·A.

Ours, where the paper does not say it: ranks lie between a quarter of ``adapter.rank`` (the slowest
device profile) and ``adapter.rank`` (the fastest); if all clients are equally fast, three ranks are
drawn by the seed in equal shares; no client is pruned below that quarter; the factor alpha / rank
stays that of the full rank, so that truncation changes nothing but the ranks it removes; an update
has one norm, over all its matrices; if all products are zero, updates are weighted by their rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from droppeft import seeds
from droppeft.adapters.tensor_names import LORA_A, LORA_B
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.federated_method import (
    Method,
    Setup,
    evaluating,
    full_instruction,
    per_client,
    start_with,
    uniform_adapter,
)
from droppeft.messages.instruction import AdapterSpec, Instruction, RankPenalty
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import GlobalModel, ServerState
from droppeft.messages.tensors import Array, LayerKey, Tensors
from droppeft.sharing.aggregation import average_over_senders, by_targets
from droppeft.sharing.factors import pairs_of
from droppeft.sharing.merge_rules import COORDINATE_RULES

LEAST_PART = 1 / 4
"""The smallest rank, as a part of the full rank."""

PENALTY, UNPENALISED_PART = 1e-3, 0.9
"""Weight of the penalty, and the part of a client's ranks that it does not apply to. The paper
tunes them between 1e-6 and 1e-3, and between 0.85 and 1."""


@dataclass(frozen=True)
class Ranks:
    """The method's memory in :class:`~droppeft.messages.server_state.ServerState`.

    Attributes:
        ranks: the current rank of each client.
    """

    ranks: tuple[int, ...]


def resized(tensors: Tensors, rank: int) -> Tensors:
    """Truncate LoRA's matrices to a rank, or pad them with zeros; other tensors are unchanged."""
    return {
        key: {name: _resized(name, value, rank) for name, value in named.items()}
        for key, named in tensors.items()
    }


def _resized(name: str, value: Array, rank: int) -> Array:
    axis = 0 if LORA_A in name else 1 if LORA_B in name else None  # A is (r, in), B is (out, r)
    if axis is None:
        return value
    shape = list(value.shape)
    shape[axis] = rank
    result = np.zeros(shape, value.dtype)
    common = tuple(slice(min(a, b)) for a, b in zip(shape, value.shape, strict=True))
    result[common] = value[common]
    return result


def product_norm(tensors: Tensors) -> float:
    """Frobenius norm of all products B·A together."""
    return math.sqrt(sum(_squared_norm(a, b) for a, b in _pairs(tensors)))


def _squared_norm(a: Array, b: Array) -> float:
    """||B·A||², computed as the sum of the entries of (BᵀB)∘(AAᵀ), which are (r, r)."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return max(0.0, float(((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum()))


def _pairs(tensors: Tensors) -> list[tuple[Array, Array]]:
    return [(tensors[key][a], tensors[key][b]) for key, a, b in pairs_of(tensors)]


def tail_norm(tensors: Tensors, start: int) -> float:
    """Sum of ||B[:, start:]||·||A[start:]|| over all pairs of matrices, as the penalty has it."""
    return sum(
        float(np.linalg.norm(b[:, start:]) * np.linalg.norm(a[start:])) for a, b in _pairs(tensors)
    )


def first_ranks(setup: Setup, full: int) -> Ranks:
    """The initial rank of each client."""
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


def check_rule(config: Config) -> None:
    """Refuse merge rules that compare value by value what has another rank in each client.

    Raises:
        DroppeftError: for ``server.merge=median`` and ``trimmed_mean``.
    """
    if config.server.merge in COORDINATE_RULES:
        raise DroppeftError(
            f"server.merge={config.server.merge} is not possible with method={config.method}, "
            "whose clients have different ranks; set server.merge=krum or multi_krum"
        )


def _init(setup: Setup) -> ServerState:
    state = start_with(setup, uniform_adapter(setup))
    return replace(state, memory=first_ranks(setup, setup.config.adapter.rank or 0))


def _with_penalty(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    instruction = at_rank(setup, state, round, client)
    least = _least(setup.config.adapter.rank or 0)
    penalty = RankPenalty(PENALTY, _unpenalised(_ranks(state)[client], least))
    return replace(instruction, objective=replace(instruction.objective, rank_penalty=penalty))


def at_rank(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    """The full instruction, truncated to the client's current rank."""
    instruction, rank = full_instruction(setup, state, round, client), _ranks(state)[client]
    return replace(
        instruction,
        adapter=_truncated(instruction.adapter, rank),
        tensors=resized(instruction.tensors, rank),
    )


def _truncated(full: AdapterSpec, rank: int) -> AdapterSpec:
    """The adapter with a smaller rank and the same alpha / rank."""
    full_rank = max(layer.rank or 0 for layer in full.layers if layer)
    layers = tuple(replace(layer, rank=rank) if layer else None for layer in full.layers)
    alpha = None if full.alpha is None else full.alpha * rank / full_rank
    return replace(full, layers=layers, alpha=alpha)


def _unpenalised(rank: int, least: int) -> int:
    """How many of the first ranks have no penalty; at least the smallest rank."""
    return max(least, math.floor(UNPENALISED_PART * rank))


def _least(full: int) -> int:
    """The smallest rank of any client; r_min in the paper."""
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

    weight = by_norm if any(norms.values()) else by_targets
    tensors = average_over_senders(state.model.tensors, updates, weight)
    model = GlobalModel(state.model.adapter, tensors, state.model.base_delta)
    return replace(state, model=model, memory=Ranks(tuple(ranks)))


def _pruned(rank: int, least: int, sent: Tensors, trained: Tensors) -> int:
    """The rank after a local training: without its last part if training made that smaller."""
    start = _unpenalised(rank, least)
    return start if tail_norm(trained, start) < tail_norm(sent, start) else rank


FEDHETLORA = Method(
    name="fedhetlora",
    summary="LoRA with a rank per client, which is pruned during the run (HetLoRA)",
    tables=frozenset({"frozen"}),
    init=_init,
    instruct=per_client(_with_penalty),
    merge=_merge,
    check=check_rule,
    lora_options=frozenset(),
    evaluate_client=evaluating(at_rank),
    memory_type=Ranks,
)
