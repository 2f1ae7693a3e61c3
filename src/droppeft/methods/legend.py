"""LEGEND: adapters in as many last layers as a client has time for, larger towards the output.

Source: arXiv:2412.20004. There ranks grow in arithmetic progression towards the output and a
client's depth follows from what it can compute. The numbers are ours: the rank of layer l of L is
``adapter.rank`` times (l + 1) / L + (L - 1) / 2L, which is between a half and one and a half of it
and ``adapter.rank`` on average; the fastest kind of client trains all layers, every other kind as
many of the last ones as it can in the same modelled time, and a quarter of them at least. Below
the lowest adapter a layer runs forward only.
"""

import math
from dataclasses import replace

from droppeft.config import Config, DeviceProfile, TrainingConfig
from droppeft.costs.modelled_clock import Arithmetic, compute_seconds
from droppeft.errors import DroppeftError
from droppeft.federated_method import (
    Method,
    Setup,
    average_by_examples,
    for_each,
    full_instruction,
    start_with,
    uniform_adapter,
)
from droppeft.messages import AdapterSpec, Instruction, ServerState, restrict

LEAST_PART = 1 / 4
"""Of the layers that every client trains."""


def ranks(rank: int, num_layers: int) -> tuple[int, ...]:
    """Rank of every layer, the first is nearest the input; 1 at least."""
    first = (num_layers + 1) / 2
    grown = (rank * (first + layer) / num_layers for layer in range(num_layers))
    return tuple(max(1, round(each)) for each in grown)


def depth_of(setup: Setup, full: AdapterSpec, client: int) -> int:
    """How many of the last layers a client trains; all of them without a modelled clock."""
    if setup.clock is None:
        return setup.num_layers
    fleet, arithmetic = setup.clock.fleet, setup.clock.arithmetic(full)

    def seconds(profile: DeviceProfile, depth: int) -> float:
        return _step_seconds(arithmetic, profile, setup.num_layers - depth, setup.config.training)

    there = {name: fleet.profiles[name] for name in fleet.names}
    shortest = min(seconds(profile, setup.num_layers) for profile in there.values())
    least, own = math.ceil(LEAST_PART * setup.num_layers), fleet.profile(client)
    deeper = range(least, setup.num_layers + 1)
    return max((depth for depth in deeper if seconds(own, depth) <= shortest), default=least)


def _step_seconds(
    arithmetic: Arithmetic, profile: DeviceProfile, lower: int, training: TrainingConfig
) -> float:
    """Modelled seconds of a step of full texts in which the layers above ``lower`` are trained."""
    forward, _ = arithmetic.forward(training.max_length)
    both, rest = arithmetic.training(training.max_length)
    flops = sum(forward[:lower]) + sum(both[lower:]) + rest
    return compute_seconds(profile, training.batch_size * flops, steps=1)


def _check(config: Config) -> None:
    if config.adapter.rank is None:
        raise DroppeftError(
            f"method=legend gives every layer its rank, and adapter.type={config.adapter.type} "
            "has none; set adapter.type=lora"
        )


def _init(setup: Setup) -> ServerState:
    adapter = uniform_adapter(setup)
    sized = ranks(setup.config.adapter.rank or 0, setup.num_layers)
    layers = tuple(
        replace(layer, rank=rank) if layer else None
        for layer, rank in zip(adapter.layers, sized, strict=True)
    )
    state = start_with(setup, replace(adapter, layers=layers))
    if setup.clock is not None:
        setup.clock.arithmetic(state.model.adapter)  # counted here and not in the first round
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
    )


LEGEND = Method(
    name="legend",
    summary="adapters in as many last layers as a client has time for (LEGEND)",
    tables=frozenset({"server"}),
    init=_init,
    instruct=for_each(_last_layers),
    merge=average_by_examples,
    check=_check,
)
