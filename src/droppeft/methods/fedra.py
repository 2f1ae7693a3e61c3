"""FedRA: in every round each client runs, trains and shares a random set of layers.

Source: arXiv:2311.11227, whose allocation matrix is drawn here from (seed, round, client). There a
client's memory says how many layers it gets; here `dropout.mean` or `dropout.count` does, for all
alike, and `dropout`'s shape and protected ends say how likely each is (ours; no ends are protected
there). It is layer dropout with one draw per turn, of which only the layers that run travel.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft import seeds
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.federated_method import (
    Method,
    Setup,
    average_by_examples,
    full_instruction,
    start_with,
    uniform_adapter,
)
from droppeft.layer_dropout import sample_active
from droppeft.messages import Instruction, LayerDropout, ServerState, flatten, restrict
from droppeft.methods.droppeft import rates_of_round


def _check(config: Config) -> None:
    if config.dropout.every not in (1, "round"):
        raise DroppeftError(
            f"method=fedra draws layers for a client's whole turn; dropout.every="
            f"{config.dropout.every} is not possible, leave it out"
        )


def _init(setup: Setup) -> ServerState:
    state = start_with(setup, uniform_adapter(setup))
    rates_of_round(setup, 1)
    return state


def _instruct(
    setup: Setup, state: ServerState, round: int, cohort: Sequence[int]
) -> list[Instruction]:
    rates = rates_of_round(setup, round)
    instructions = []
    for client in cohort:
        rng = seeds.python_generator(
            setup.config.seed, purpose="layers", round=round, client=client
        )
        active = sample_active(rates, setup.config.dropout.sampling, rng)
        instructions.append(_of_layers(setup, state, round, client, active))
    return instructions


def _of_layers(
    setup: Setup, state: ServerState, round: int, client: int, active: Sequence[bool]
) -> Instruction:
    """An instruction in which these layers run, travel and are trained, and the head."""
    gates = LayerDropout(tuple(0.0 if on else 1.0 for on in active), "exact", every=None)
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
    merge=average_by_examples,
    check=_check,
)
