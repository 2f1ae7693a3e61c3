"""Evaluate every client's own model on its own test rows: the personalised accuracy; ours.

This happens once, at the end of a run, and only for the report: the modelled clock does not count
it, and no state depends on it. Clients that never trained are evaluated too.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, isfinite
from statistics import fmean, pstdev
from typing import Any

from droppeft.messages import (
    EvaluationReply,
    Failure,
    Instruction,
    Reply,
    ServerState,
    Update,
)
from droppeft.methods import Method, Setup
from droppeft.server.validation import check_reply, why_not_its_own
from droppeft.sharing.participation import with_participations
from droppeft.transports.base import Transport


@dataclass(frozen=True)
class ClientEvaluation:
    """The replies of all clients.

    Attributes:
        measurements: by client, in ascending order.
        failures: of the clients that could not be measured.
        wall_s: seconds on this machine.
        lost: clients that have lost their saved state; they were measured with the model with
            which they would start again.
    """

    measurements: tuple[EvaluationReply, ...]
    failures: tuple[Failure, ...]
    wall_s: float
    lost: tuple[int, ...] = ()


def evaluate_clients(
    setup: Setup,
    method: Method,
    transport: Transport,
    state: ServerState,
    round: int,
) -> ClientEvaluation:
    """Have every client measure its own model.

    A client that has lost its saved state is asked a second time, with all tensors in the
    instruction.

    Args:
        round: the one that would come next.
    """
    start = time.perf_counter()
    instructions = [
        method.evaluate_client(setup, state, round, client)
        for client in range(setup.config.clients)
    ]
    replies = _exchange(setup, transport, instructions)
    lost = tuple(reply.client for reply in replies if isinstance(reply, Failure) and reply.lost)
    if lost:
        state = with_participations(state, instructions, replies)
        again = [method.evaluate_client(setup, state, round, client) for client in lost]
        second = dict(zip(lost, _exchange(setup, transport, again), strict=True))
        replies = [
            second.get(instruction.client, reply)
            for instruction, reply in zip(instructions, replies, strict=True)
        ]
    return ClientEvaluation(
        tuple(reply for reply in replies if isinstance(reply, EvaluationReply)),
        tuple(reply for reply in replies if isinstance(reply, Failure)),
        time.perf_counter() - start,
        lost,
    )


def _exchange(
    setup: Setup, transport: Transport, instructions: Sequence[Instruction]
) -> list[Reply]:
    """Return checked replies; no more clients are asked at once than in a round."""
    replies: list[Reply] = []
    for first in range(0, len(instructions), setup.config.drawn):
        batch = instructions[first : first + setup.config.drawn]
        arrived = {arrival.index: arrival.reply for arrival in transport.exchange(batch)}
        replies += [
            check_reply(instruction, arrived.get(index), partial(_why_refused, instruction))
            for index, instruction in enumerate(batch)
        ]
    return replies


def summarise_clients(
    evaluation: ClientEvaluation, participations: Mapping[int, int]
) -> dict[str, Any]:
    """Values for ``result.json``; every client has the same weight, however many rows it has.

    ``personalised_worst_tenth`` is the mean of the lowest tenth of the clients' accuracies, rounded
    up to whole clients. ``personalised_deviation`` is their standard deviation.

    Args:
        participations: number of merged updates of each client that has any.
    """
    measurements = evaluation.measurements
    accuracies = [each.accuracy for each in measurements]
    worst = sorted(accuracies)[: ceil(len(accuracies) / 10)]
    trained = [each.accuracy for each in measurements if participations.get(each.client)]
    return {
        "personalised_accuracy": _mean(accuracies),
        "personalised_worst_tenth": _mean(worst),
        "personalised_deviation": pstdev(accuracies) if accuracies else None,
        "personalised_accuracy_trained": _mean(trained),
        "personalised_clients": len(accuracies),
        "personalised_rows": sum(each.rows for each in measurements),
        "personalised_wall_s": evaluation.wall_s,
        "personalised": [
            {
                "client": each.client,
                "participations": participations.get(each.client, 0),
                "rows": each.rows,
                "accuracy": each.accuracy,
                "loss": each.loss,
            }
            for each in measurements
        ],
        "personalised_lost": list(evaluation.lost),
        "personalised_failures": [
            {"client": failure.client, "reason": failure.reason} for failure in evaluation.failures
        ],
    }


def _why_refused(instruction: Instruction, reply: Update | EvaluationReply) -> str | None:
    if isinstance(reply, Update):
        return "sent an update in place of an evaluation"
    if reply.rows > 0 and 0 <= reply.accuracy <= 1 and isfinite(reply.loss):
        return why_not_its_own(instruction, reply)
    return "its measurement has impossible values"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
