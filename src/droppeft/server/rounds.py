"""One federated round: draw a cohort, instruct it, collect, check, bound and merge its replies.

The loop does not know which method it runs. Merging starts after the last reply and takes the
replies in the order of the instructions, so the result depends neither on the order of arrival nor
on the transport.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from droppeft import seeds
from droppeft.config import Config, ServerConfig
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import EvaluationReply, Failure, Reply, Update
from droppeft.messages.server_state import ServerState
from droppeft.methods import Method, Setup
from droppeft.runs.ledger import ClosedRound
from droppeft.runs.method_memory import decode_memory, encode_memory
from droppeft.server.finite_models import is_finite
from droppeft.server.private_merge import draw_privately, private_update
from droppeft.server.round_cost import close_round, counting_wall_s
from droppeft.server.validation import check_reply, why_refused
from droppeft.sharing.bounding import bounded
from droppeft.sharing.direction_check import compare_directions, without_opposed
from droppeft.sharing.merge_rules import clients_set_aside, combined, fewest_updates
from droppeft.tasks.registry import task_named
from droppeft.transports.base import Arrival, Transport

OnReply = Callable[[Reply], None]


def run_round(
    setup: Setup,
    method: Method,
    transport: Transport,
    state: ServerState,
    round: int,
    on_reply: OnReply,
) -> tuple[ServerState, ClosedRound]:
    """Run one round; if fewer updates than the quorum can be merged, none is.

    Nor is one if the merged values are not finite: the state then stays as it was.

    Args:
        round: 1 for the first.
        on_reply: called once per reply as it arrives, to show progress.

    Returns:
        The server's state after the round, and a record of the round for the ledger.
    """
    start, counted_s = time.perf_counter(), counting_wall_s(setup.clock)
    available, absent = _available_clients(setup, round)
    instructions = method.instruct(setup, state, round, available)
    instruct_wall_s = time.perf_counter() - start

    arrivals: dict[int, Arrival] = {}
    for arrival in transport.exchange(instructions):
        arrivals[arrival.index] = arrival
        on_reply(arrival.reply)

    start = time.perf_counter()
    checked_replies = [
        _check(setup, instruction, arrivals.get(index))
        for index, instruction in enumerate(instructions)
    ]
    replies, modelled = close_round(
        setup.clock, _accepting(setup.config, instructions), instructions, checked_replies
    )
    settings, model = _server_settings(setup.config), state.model
    received = _apply_quorum(replies, max(setup.config.quorum, fewest_updates(settings)))
    replies, bounds = bounded(settings, model, instructions, received)
    directions = compare_directions(settings, model, instructions, replies, state.agreement)
    # Krum chooses among the others, since its only choice may be one that is left out.
    not_opposed = without_opposed(received, directions)
    set_aside = clients_set_aside(settings, model, instructions, not_opposed)
    replies = combined(settings, without_opposed(replies, directions), set_aside)
    state, replies = _merge(setup, method, state, instructions, replies)
    state = replace(state, agreement=directions.agreement)
    merge_wall_s = time.perf_counter() - start

    # Counting operations for the modelled clock is no work of a real server.
    counted_s = counting_wall_s(setup.clock) - counted_s
    return state, ClosedRound(
        round=round,
        instructions=tuple(instructions),
        checked_replies=tuple(checked_replies),
        replies=tuple(replies),
        modelled=replace(modelled, absent=absent),
        clipped=bounds.clipped,
        limited=bounds.limited,
        opposed=directions.opposed,
        agreement=directions.agreement,
        set_aside=set_aside,
        server_wall_s=instruct_wall_s + merge_wall_s - counted_s,
    )


def draw_cohort(setup: Setup, round: int) -> Sequence[int]:
    """Draw the clients of a round, uniformly without replacement, from (seed, round) alone.

    With over-selection, more than ``cohort_size`` clients are drawn. With differential privacy,
    each client is drawn independently, and from the operating system's randomness.
    """
    if setup.config.privacy.is_on:
        return draw_privately(setup.config)
    rng = seeds.numpy_generator(setup.config.seed, purpose="cohort", round=round)
    drawn = rng.choice(setup.config.clients, size=setup.config.drawn, replace=False)
    return [int(client) for client in np.sort(drawn)]


def _available_clients(setup: Setup, round: int) -> tuple[list[int], tuple[int, ...]]:
    """Draw a cohort; return its available and its absent clients.

    Availability follows from the device profiles. Without a modelled clock, all are available.
    """
    drawn = list(draw_cohort(setup, round))
    if setup.clock is None:
        return drawn, ()
    fleet = setup.clock.fleet
    available = [client for client in drawn if fleet.is_available(round, client)]
    return available, tuple(client for client in drawn if client not in available)


def _check(setup: Setup, instruction: Instruction, arrival: Arrival | None) -> Reply:
    """Return the reply to an instruction, or a failure if it is missing or must be refused."""

    def why_not(reply: Update | EvaluationReply) -> str | None:
        if isinstance(reply, EvaluationReply):
            return "sent an evaluation in place of an update"
        layout = setup.layout(instruction.adapter)
        return why_refused(instruction, reply, layout, task_named(setup.config.task))

    return check_reply(instruction, arrival.reply if arrival else None, why_not)


def _accepting(config: Config, instructions: Sequence[Instruction]) -> Config:
    """With differential privacy, all clients that were drawn are merged, however many they are."""
    if not config.privacy.is_on:
        return config
    return config.model_copy(update={"cohort_size": len(instructions)})


def _server_settings(config: Config) -> ServerConfig:
    """The settings of the server table that bound updates and combine them.

    With differential privacy a change is clipped to a norm that does not depend on other clients,
    and no update has a weight.
    """
    if not config.privacy.is_on:
        return config.server
    none = {"clip_norm_multiple": 0.0, "max_weight_multiple": 0.0, "merge": "mean"}
    return config.server.model_copy(update={**none, "direction_check": False})


def _apply_quorum(replies: list[Reply], quorum: int) -> list[Reply]:
    """Replace all updates by failures if there are fewer of them than the quorum."""
    updates = sum(isinstance(reply, Update) for reply in replies)
    if updates >= quorum:
        return replies
    return _all_set_aside(replies, f"{updates} of the {quorum} updates that a round needs")


def _all_set_aside(replies: Sequence[Reply], reason: str) -> list[Reply]:
    """Replace all updates by failures with a reason."""
    return [
        Failure(reply.client, f"set aside: {reason}") if isinstance(reply, Update) else reply
        for reply in replies
    ]


def _merge(
    setup: Setup,
    method: Method,
    state: ServerState,
    instructions: Sequence[Instruction],
    replies: list[Reply],
) -> tuple[ServerState, list[Reply]]:
    """Merge the replies, or none of them if that gives values that are not finite.

    Returns:
        The state after the round, and the replies as they were merged.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        merged = _merged(setup, method, state, instructions, replies)
    if not is_finite(merged):
        return refuse_round(setup, method, state, instructions, replies, "its merged values")
    return _as_saved(merged), replies


def _merged(
    setup: Setup,
    method: Method,
    state: ServerState,
    instructions: Sequence[Instruction],
    replies: Sequence[Reply],
) -> ServerState:
    """Merge the replies or, with differential privacy, one update in the place of all."""
    if not setup.config.privacy.is_on:
        return method.merge(setup, state, instructions, replies)
    assert method.sent is not None
    update = private_update(setup.config, state, method.sent(state), replies)
    return method.merge(setup, state, (), (update,))


def refuse_round(
    setup: Setup,
    method: Method,
    state: ServerState,
    instructions: Sequence[Instruction],
    replies: Sequence[Reply],
    what: str,
) -> tuple[ServerState, list[Reply]]:
    """Return the state after a round of which nothing is merged, and its replies as failures.

    Args:
        state: the state before the round.
        instructions: of the round.
        replies: in the same order.
        what: is not finite.
    """
    refused = _all_set_aside(replies, f"the round was refused, because {what} are not finite")
    return _as_saved(method.merge(setup, state, instructions, refused)), refused


def _as_saved(state: ServerState) -> ServerState:
    """Return the state as it would come back from a checkpoint.

    A run that is resumed therefore continues from the same values as one that was never stopped.
    """
    memory = decode_memory(encode_memory(state.memory), type(state.memory))
    return replace(state, memory=memory)
