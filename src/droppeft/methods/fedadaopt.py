"""FedAdaOPT: one bottleneck adapter for all clients, which grows in fixed steps.

The DropPEFT paper (arXiv:2503.10217) names it as a baseline; we know of no description of it.
Ours: `fedadapter` without trial groups. It begins with the same depth and width; after every three
rounds one more layer gets an adapter and all adapters become 8 wider, up to the same limits.
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
    """The method's memory in :class:`~droppeft.messages.ServerState`.

    Attributes:
        rounds: number of rounds in which at least one update was merged.
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
    """Average the updates, and let the adapter grow when it is due.

    A round without updates does not count.
    """
    if not any(isinstance(reply, Update) for reply in replies):
        return state
    before: Growth = state.memory
    growth = Growth(before.rounds + 1)
    model = plain_mean(state.model, replies)
    (depth, width), (deepest, widest) = _shape(model), largest_shape(setup)
    if growth.rounds % TRIAL_ROUNDS == 0 and (depth, width) != (deepest, widest):
        larger = min(depth + 1, deepest), min(width + WIDER_BY, widest)
        model = grown(setup, model, spec_of(setup, *larger))
    return replace(state, model=model, memory=growth)


def _shape(model: GlobalModel) -> tuple[int, int]:
    """Number of layers with an adapter, and the width of these adapters."""
    widths = [layer.width or 0 for layer in model.adapter.layers if layer]
    return len(widths), widths[-1]


FEDADAOPT = Method(
    name="fedadaopt",
    summary="bottlenecks that grow in fixed steps of depth and width (FedAdaOPT, ours)",
    tables=frozenset({"frozen"}),
    init=_init,
    instruct=_instruct,
    merge=_merge,
    memory_type=Growth,
    check=check_bottlenecks,
)
