"""One federated round: plan, exchange, check, merge. The loop knows no method by name.

Merging waits until the round has closed and then runs in instruction order, so that the result
depends on neither the order of arrival nor the transport.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from droppeft import seeds
from droppeft.messages import Failure, Instruction, Measurement, Reply, ServerState, Update
from droppeft.methods import Method, Setup
from droppeft.runs.ledger import ClosedRound
from droppeft.runs.method_memory import decode_memory, encode_memory
from droppeft.server.round_cost import close_round, counting_wall_s
from droppeft.server.validation import checked, why_refused
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
    """Play one round; with fewer acceptable Updates than the quorum, nothing is merged.

    Args:
        round: 1 for the first.
        on_reply: called once per reply as it arrives, for progress.
    """
    start, counted_s = time.perf_counter(), counting_wall_s(setup.clock)
    present, absent = _presence(setup, round)
    instructions = method.instruct(setup, state, round, present)
    planned_s = time.perf_counter() - start
    arrived: dict[int, Arrival] = {}
    for arrival in transport.exchange(instructions):
        arrived[arrival.index] = arrival
        on_reply(arrival.reply)
    start = time.perf_counter()
    answers = [
        _checked(setup, instruction, arrived.get(index))
        for index, instruction in enumerate(instructions)
    ]
    replies, modelled = close_round(setup.clock, setup.config, instructions, answers)
    replies = _with_quorum(replies, setup.config.quorum)
    state = _as_saved(method.merge(setup, state, instructions, replies))
    counted_s = counting_wall_s(setup.clock) - counted_s
    server_wall_s = planned_s + time.perf_counter() - start - counted_s
    return state, ClosedRound(
        round=round,
        instructions=tuple(instructions),
        answers=tuple(answers),
        replies=tuple(replies),
        modelled=replace(modelled, absent=absent),
        framing=tuple((one.sent_bytes, one.received_bytes) for one in arrived.values()),
        server_wall_s=server_wall_s,
    )


def draw_cohort(setup: Setup, round: int) -> Sequence[int]:
    """The clients of a round, uniformly without replacement, from (seed, round) alone.

    More than the cohort if the configuration over-selects.
    """
    rng = seeds.numpy_generator(setup.config.seed, purpose="cohort", round=round)
    drawn = rng.choice(setup.config.clients, size=setup.config.drawn, replace=False)
    return [int(client) for client in np.sort(drawn)]


def _presence(setup: Setup, round: int) -> tuple[list[int], tuple[int, ...]]:
    """The drawn clients that are there, and those that are not: no instruction is made for them."""
    drawn = list(draw_cohort(setup, round))
    if setup.clock is None:
        return drawn, ()
    there = {client for client in drawn if setup.clock.fleet.is_there(round, client)}
    present = [client for client in drawn if client in there]
    return present, tuple(client for client in drawn if client not in there)


def _checked(setup: Setup, instruction: Instruction, arrival: Arrival | None) -> Reply:
    def why_not(answer: Update | Measurement) -> str | None:
        if isinstance(answer, Measurement):
            return "answers with a measurement"
        return why_refused(instruction, answer, setup.layout(instruction.adapter))

    return checked(instruction, arrival.reply if arrival else None, why_not)


def _with_quorum(replies: list[Reply], quorum: int) -> list[Reply]:
    """Set the Updates of a round aside that too few clients answered."""
    found = sum(isinstance(reply, Update) for reply in replies)
    if found >= quorum:
        return replies
    reason = f"set aside: {found} of the {quorum} replies that a round needs"
    return [Failure(r.client, reason) if isinstance(r, Update) else r for r in replies]


def _as_saved(state: ServerState) -> ServerState:
    """The state as a checkpoint gives it back."""
    memory = decode_memory(encode_memory(state.memory), type(state.memory))
    return replace(state, memory=memory)
