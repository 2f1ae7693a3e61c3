"""FedAdaOPT: one global bottleneck configuration, upgraded in fixed steps of depth and width.

Named by DropPEFT (arXiv:2503.10217) as a baseline and not documented to us; ours: as `fedadapter`
without its trials. It begins with the same depth and width, and every three rounds adapters come
into one layer more and all become 8 wider, up to the same caps.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.methods.base import Method, Setup, full_plan, start_with
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
from droppeft.plans import Plan, Reply, ServerState, Update

DEPTH, WIDTH, ROUNDS = "depth", "width", "rounds"


def _init(setup: Setup) -> ServerState:
    check_bottlenecks(setup)
    depth, width = first_shape(setup)
    state = start_with(setup, spec_of(setup, depth, width))
    return replace(state, memory={DEPTH: depth, WIDTH: width, ROUNDS: 0})


def _plan(setup: Setup, state: ServerState, round: int, cohort: Sequence[int]) -> list[Plan]:
    frozen = setup.num_layers - _memory(state)[0]
    plans = [full_plan(setup, state, round, device, dropout=None) for device in cohort]
    return [replace(plan, frozen=frozen) for plan in plans]


def _merge(
    setup: Setup, state: ServerState, plans: Sequence[Plan], replies: Sequence[Reply]
) -> ServerState:
    """Average, and upgrade when it is time; a round in which nobody answered does not count."""
    if not any(isinstance(reply, Update) for reply in replies):
        return state
    depth, width, rounds = _memory(state)
    model = plain_mean(state.model, replies)
    most_deep, most_wide = largest_shape(setup)
    if (rounds + 1) % TRIAL_ROUNDS == 0 and (depth, width) != (most_deep, most_wide):
        depth, width = min(depth + 1, most_deep), min(width + WIDER_BY, most_wide)
        model = grown(setup, model, spec_of(setup, depth, width))
    return ServerState(model, {}, {DEPTH: depth, WIDTH: width, ROUNDS: rounds + 1})


def _memory(state: ServerState) -> tuple[int, int, int]:
    depth, width, rounds = (state.memory[key] for key in (DEPTH, WIDTH, ROUNDS))
    assert isinstance(depth, int)
    assert isinstance(width, int)
    assert isinstance(rounds, int)
    return depth, width, rounds


FEDADAOPT = Method(
    name="fedadaopt",
    summary="bottlenecks upgraded in fixed steps of depth and width (FedAdaOPT, ours)",
    tables=frozenset({"frozen"}),
    init=_init,
    plan=_plan,
    merge=_merge,
)
