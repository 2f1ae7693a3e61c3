"""LEGEND: adapters in the last layers, as many as a client has time for, with growing ranks.

From the paper (arXiv:2412.20004): ranks grow towards the output in arithmetic progression, and the
number of layers with an adapter follows from a client's computing power. The layers below the
lowest adapter run forward only.

Ours: the numbers. Layer l of L (from 0) has the rank ``adapter.rank`` times
(l + 1) / L + (L - 1) / 2L: the mean is ``adapter.rank``, and ranks lie between about 0.5 and 1.5
times ``adapter.rank``. Clients with the fastest device profile train all layers; others train as
many of the last layers as fit into the same modelled time, and at least a quarter of the layers.
"""

import math
from dataclasses import replace

from droppeft.config import Config, DeviceProfile, TrainingConfig
from droppeft.costs.modelled_clock import Arithmetic, compute_seconds
from droppeft.errors import DroppeftError
from droppeft.federated_method import (
    Method,
    Setup,
    all_tensors,
    average_by_targets,
    full_instruction,
    per_client,
    start_with,
    uniform_adapter,
)
from droppeft.messages.instruction import AdapterSpec, Instruction
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import restrict

LEAST_PART = 1 / 4
"""The smallest part of the layers that a client trains."""


def ranks(rank: int, num_layers: int) -> tuple[int, ...]:
    """Rank of every layer, from the input to the output; at least 1."""
    first = (num_layers + 1) / 2
    exact = (rank * (first + layer) / num_layers for layer in range(num_layers))
    return tuple(max(1, round(value)) for value in exact)


def depth_of(setup: Setup, full: AdapterSpec, client: int) -> int:
    """How many of the last layers a client trains; all layers if there is no modelled clock."""
    if setup.clock is None:
        return setup.num_layers
    fleet, arithmetic = setup.clock.fleet, setup.clock.arithmetic(full)

    def seconds(profile: DeviceProfile, depth: int) -> float:
        return _step_seconds(arithmetic, profile, setup.num_layers - depth, setup.config.training)

    assigned = {name: fleet.profiles[name] for name in fleet.names}
    shortest = min(seconds(profile, setup.num_layers) for profile in assigned.values())
    least, profile = math.ceil(LEAST_PART * setup.num_layers), fleet.profile(client)
    depths = range(least, setup.num_layers + 1)
    return max((depth for depth in depths if seconds(profile, depth) <= shortest), default=least)


def _step_seconds(
    arithmetic: Arithmetic, profile: DeviceProfile, lower: int, training: TrainingConfig
) -> float:
    """Modelled seconds of a step with rows of full length; layers from ``lower`` on are trained."""
    forward, _ = arithmetic.forward(training.max_length)
    both, rest = arithmetic.training(training.max_length)
    flops = sum(forward[:lower]) + sum(both[lower:]) + rest
    return compute_seconds(profile, training.batch_size * flops, steps=1)


def _check(config: Config) -> None:
    if config.adapter.rank is None:
        raise DroppeftError(
            f"method=legend sets a rank per layer, but adapter.type={config.adapter.type} "
            "has none; set adapter.type=lora"
        )


def _init(setup: Setup) -> ServerState:
    adapter = uniform_adapter(setup)
    layer_ranks = ranks(setup.config.adapter.rank or 0, setup.num_layers)
    layers = tuple(
        replace(layer, rank=rank) if layer else None
        for layer, rank in zip(adapter.layers, layer_ranks, strict=True)
    )
    state = start_with(setup, replace(adapter, layers=layers))
    if setup.clock is not None:
        setup.clock.arithmetic(state.model.adapter)  # so that round 1 need not wait for it
    return state


def _last_layers(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    full = state.model.adapter
    lower = setup.num_layers - depth_of(setup, full, client)
    adapter = replace(full, layers=(None,) * lower + full.layers[lower:])
    instruction = full_instruction(setup, state, round, client)
    names = frozenset(setup.layout(adapter))
    return replace(
        instruction,
        adapter=adapter,
        tensors=restrict(instruction.tensors, names),
        share=instruction.share & names,
        starts=(lower,),
    )


LEGEND = Method(
    name="legend",
    summary="adapters in the last layers, as many as a client has time for (LEGEND)",
    tables=frozenset({"server"}),
    init=_init,
    instruct=per_client(_last_layers),
    merge=average_by_targets,
    sent=all_tensors,
    check=_check,
)
