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
from droppeft.federation.transport import Transport
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
        server_wall_s: planning, checking and merging on the server.
    """

    plans: tuple[Plan, ...]
    replies: tuple[Reply, ...]
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
    """Play one round; with no acceptable Update the method merges nothing.

    Args:
        round: 1 for the first.
        on_reply: called once per reply as it arrives, for progress.
    """
    start = time.perf_counter()
    plans = method.plan(setup, state, round, draw_cohort(setup, round))
    planned_s = time.perf_counter() - start
    arrived: dict[int, Reply] = {}
    for index, reply in transport.exchange(plans):
        arrived[index] = reply
        on_reply(reply)
    start = time.perf_counter()
    replies = tuple(_checked(setup, plan, arrived.get(index)) for index, plan in enumerate(plans))
    state = _as_saved(method.merge(setup, state, plans, replies))
    return state, Closed(tuple(plans), replies, planned_s + time.perf_counter() - start)


def draw_cohort(setup: Setup, round: int) -> Sequence[int]:
    """The devices of a round, uniformly without replacement, from (seed, round) alone."""
    rng = seeds.numpy_generator(setup.config.seed, purpose="cohort", round=round)
    drawn = rng.choice(setup.config.devices, size=setup.config.cohort, replace=False)
    return [int(device) for device in np.sort(drawn)]


def _checked(setup: Setup, plan: Plan, reply: Reply | None) -> Reply:
    if reply is None:
        return Failure(plan.device, "sent no reply")
    if isinstance(reply, Failure):
        return reply
    layout, batch_size = setup.layout(plan.adapter), setup.config.training.batch_size
    reason = why_refused(plan, reply, layout, batch_size)
    return reply if reason is None else Failure(plan.device, f"refused: {reason}")


def _as_saved(state: ServerState) -> ServerState:
    """The state as a checkpoint gives it back: JSON has no tuples and no keys but texts."""
    return replace(state, memory=json.loads(json.dumps(state.memory)))
