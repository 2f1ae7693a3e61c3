"""One federated round: plan, exchange, check, merge. The loop knows no method by name.

Merging waits until the round has closed and then runs in Plan order, so that the result depends on
neither the order of arrival nor the transport.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from droppeft import seeds
from droppeft.federation.transport import Arrival, Transport
from droppeft.federation.validation import why_refused
from droppeft.methods import Method, Setup
from droppeft.plans import Failure, Plan, Reply, ServerState, Update

OnReply = Callable[[Reply], None]


@dataclass(frozen=True)
class Closed:
    """A round after its last reply.

    Attributes:
        plans: in cohort order.
        replies: in the same order, refused Updates replaced by their Failure.
        arrivals: what the transport handed over, in order of arrival.
        server_wall_s: planning, checking and merging on the server.
    """

    plans: tuple[Plan, ...]
    replies: tuple[Reply, ...]
    arrivals: tuple[Arrival, ...]
    server_wall_s: float

    @property
    def accepted(self) -> tuple[Update, ...]:
        """The Updates that were merged, in Plan order."""
        return tuple(reply for reply in self.replies if isinstance(reply, Update))


def play_round(
    setup: Setup,
    method: Method,
    transport: Transport,
    state: ServerState,
    round: int,
    on_reply: OnReply,
) -> tuple[ServerState, Closed]:
    """Play one round; with fewer acceptable Updates than the quorum, nothing is merged.

    Args:
        round: 1 for the first.
        on_reply: called once per reply as it arrives, for progress.
    """
    start = time.perf_counter()
    plans = method.plan(setup, state, round, draw_cohort(setup, round))
    planned_s = time.perf_counter() - start
    arrived: dict[int, Arrival] = {}
    for arrival in transport.exchange(plans):
        arrived[arrival.index] = arrival
        on_reply(arrival.reply)
    start = time.perf_counter()
    replies = [_checked(setup, plan, arrived.get(index)) for index, plan in enumerate(plans)]
    replies = _with_quorum(replies, setup.config.quorum)
    state = _as_saved(method.merge(setup, state, plans, replies))
    server_wall_s = planned_s + time.perf_counter() - start
    return state, Closed(tuple(plans), tuple(replies), tuple(arrived.values()), server_wall_s)


def draw_cohort(setup: Setup, round: int) -> Sequence[int]:
    """The devices of a round, uniformly without replacement, from (seed, round) alone."""
    rng = seeds.numpy_generator(setup.config.seed, purpose="cohort", round=round)
    drawn = rng.choice(setup.config.devices, size=setup.config.cohort, replace=False)
    return [int(device) for device in np.sort(drawn)]


def _checked(setup: Setup, plan: Plan, arrival: Arrival | None) -> Reply:
    if arrival is None:
        return Failure(plan.device, "sent no reply")
    reply = arrival.reply
    if isinstance(reply, Failure):
        return Failure(plan.device, reply.reason)
    layout, batch_size = setup.layout(plan.adapter), setup.config.training.batch_size
    reason = why_refused(plan, reply, layout, batch_size)
    return reply if reason is None else Failure(plan.device, f"refused: {reason}")


def _with_quorum(replies: list[Reply], quorum: int) -> list[Reply]:
    """Set the Updates of a round aside that too few devices answered."""
    found = sum(isinstance(reply, Update) for reply in replies)
    if found >= quorum:
        return replies
    reason = f"set aside: {found} of the {quorum} replies that a round needs"
    return [Failure(r.device, reason) if isinstance(r, Update) else r for r in replies]


def _as_saved(state: ServerState) -> ServerState:
    """The state as a checkpoint gives it back: JSON has no tuples and no keys but texts."""
    return replace(state, memory=json.loads(json.dumps(state.memory)))
