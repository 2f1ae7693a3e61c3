"""FedAdaOPT: one global bottleneck configuration, upgraded in fixed steps of depth and width.

Named by DropPEFT (arXiv:2503.10217) as a baseline and not documented to us; ours: as `fedadapter`
without its trials. It begins with the same depth and width, and every three rounds adapters come
into one layer more and all become 8 wider, up to the same caps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from droppeft.federated_method import Method, Setup, full_instruction, start_with
from droppeft.messages import GlobalModel, Instruction, Reply, ServerState, Update
from droppeft.methods.fedadapter import (
    TRIAL_ROUNDS,
    WIDER_BY,
    check_bottlenecks,
    first_shape,
    grown,
    largest_shape,
    plain_mean,
    spec_of,
)


@dataclass(frozen=True)
class Growth:
    """The state's memory.

    Attributes:
        rounds: so many counted.
    """

    rounds: int = 0


def _init(setup: Setup) -> ServerState:
    state = start_with(setup, spec_of(setup, *first_shape(setup)))
    return replace(state, memory=Growth())


def _instruct(
    setup: Setup, state: ServerState, round: int, cohort: Sequence[int]
) -> list[Instruction]:
    frozen = setup.num_layers - _shape(state.model)[0]
    instructions = [full_instruction(setup, state, round, client) for client in cohort]
    return [replace(instruction, frozen=frozen) for instruction in instructions]


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    """Average, and upgrade when it is time; a round in which nobody answered does not count."""
    if not any(isinstance(reply, Update) for reply in replies):
        return state
    growth: Growth = state.memory
    now = Growth(growth.rounds + 1)
    model = plain_mean(state.model, replies)
    (depth, width), (deepest, widest) = _shape(model), largest_shape(setup)
    if now.rounds % TRIAL_ROUNDS == 0 and (depth, width) != (deepest, widest):
        larger = min(depth + 1, deepest), min(width + WIDER_BY, widest)
        model = grown(setup, model, spec_of(setup, *larger))
    return replace(state, model=model, memory=now)


def _shape(model: GlobalModel) -> tuple[int, int]:
    """Depth and width of its adapters."""
    widths = [layer.width or 0 for layer in model.adapter.layers if layer]
    return len(widths), widths[-1]


FEDADAOPT = Method(
    name="fedadaopt",
    summary="bottlenecks upgraded in fixed steps of depth and width (FedAdaOPT, ours)",
    tables=frozenset({"frozen"}),
    init=_init,
    instruct=_instruct,
    merge=_merge,
    memory_type=Growth,
    check=check_bottlenecks,
)
