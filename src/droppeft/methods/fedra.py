"""FedRA: in every round each client runs, trains and shares a random set of layers.

Source: arXiv:2311.11227. A client's layers are its row of the paper's allocation matrix, drawn from
(seed, round, client). In the paper a client's memory determines how many layers it gets. Ours: the
number follows from ``dropout.mean`` or ``dropout.count`` and is the same for all clients;
``dropout.shape`` says how likely each layer is to be drawn, and ``dropout.protect_first`` and
``protect_last`` keep the outer layers in (the paper protects none).

The implementation is layer dropout with one draw per local training. Only the tensors of the layers
that run, and the head, are sent in either direction.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft import seeds
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.federated_method import (
    Method,
    Setup,
    all_tensors,
    average_by_targets,
    full_instruction,
    start_with,
    uniform_adapter,
)
from droppeft.layer_dropout import sample_active
from droppeft.messages.instruction import Instruction, LayerDropout
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import flatten, restrict
from droppeft.methods.droppeft import rates_of_round


def _check(config: Config) -> None:
    if config.dropout.every not in (1, "round"):
        raise DroppeftError(
            f"method=fedra draws a client's layers once per round, so that dropout.every="
            f"{config.dropout.every} is not possible; leave it out"
        )


def _init(setup: Setup) -> ServerState:
    state = start_with(setup, uniform_adapter(setup))
    _draw(setup, state, 1, client=0)
    return state


def _instruct(
    setup: Setup, state: ServerState, round: int, cohort: Sequence[int]
) -> list[Instruction]:
    return [
        _with_layers(setup, state, round, client, _draw(setup, state, round, client))
        for client in cohort
    ]


def _draw(setup: Setup, state: ServerState, round: int, client: int) -> Sequence[bool]:
    """Which layers a client gets: at least one with an adapter, if there is no head to train."""
    rng = seeds.python_generator(setup.config.seed, purpose="layers", round=round, client=client)
    layers = [key for key in state.model.tensors if isinstance(key, int)]
    has_head = len(layers) < len(state.model.tensors)
    return sample_active(
        rates_of_round(setup, round),
        setup.config.dropout.sampling,
        rng,
        need_one_of=() if has_head else layers,
    )


def _with_layers(
    setup: Setup, state: ServerState, round: int, client: int, active: Sequence[bool]
) -> Instruction:
    """An instruction in which the active layers and the head are run, trained and sent."""
    gates = LayerDropout(tuple(0.0 if runs else 1.0 for runs in active), "exact", every=None)
    instruction = full_instruction(setup, state, round, client, gates)
    names = frozenset(
        name
        for key, name, _ in flatten(state.model.tensors)
        if not isinstance(key, int) or active[key]
    )
    return replace(
        instruction, tensors=restrict(instruction.tensors, names), train=names, share=names
    )


FEDRA = Method(
    name="fedra",
    summary="a random set of layers per client and round (FedRA)",
    tables=frozenset({"dropout", "frozen", "server"}),
    init=_init,
    instruct=_instruct,
    merge=average_by_targets,
    sent=all_tensors,
    check=_check,
)
