"""Every client's own model on its own test rows: the second of the two accuracies; ours.

It is asked for when a run ends, for the report alone: no clock counts it and nothing follows from
it. Clients that never trained are asked too.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, isfinite
from statistics import fmean, pstdev
from typing import Any

from droppeft.messages import Budget, Failure, Instruction, Measurement, Reply, ServerState, Update
from droppeft.methods import Method, Setup
from droppeft.server.validation import checked, why_not_its_own
from droppeft.sharing.participation import with_participations
from droppeft.transports.base import Transport


@dataclass(frozen=True)
class Personalised:
    """What all clients answered.

    Attributes:
        measurements: of those that did, in the order of the clients.
        failures: of the others.
        wall_s: on this machine.
        newcomers: of clients that never trained, after one epoch on their own rows; none unless
            the configuration asks for it.
        newcomer_failures: of those that did not answer to that.
        lost: clients that no longer have what they kept; measured with the global model instead.
    """

    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...]
    wall_s: float
    newcomers: tuple[Measurement, ...] = ()
    newcomer_failures: tuple[Failure, ...] = ()
    lost: tuple[int, ...] = ()


def measure_clients(
    setup: Setup,
    method: Method,
    transport: Transport,
    state: ServerState,
    round: int,
    trained: Mapping[int, int],
) -> Personalised:
    """Ask every client of the run, and newcomers once more if the configuration says so.

    A client that has lost what it kept is asked again for what it would begin with instead.

    Args:
        round: the one that would come next.
        trained: merged turns of each client that has any.
    """
    start = time.perf_counter()
    instructions = [
        method.evaluate_client(setup, state, round, client)
        for client in range(setup.config.clients)
    ]
    answers = _ask(setup, transport, instructions)
    lost = tuple(one.client for one in answers if isinstance(one, Failure) and one.lost)
    forgotten = with_participations(state, instructions, answers) if lost else state
    again = [method.evaluate_client(setup, forgotten, round, client) for client in lost]
    instead = dict(zip(lost, _ask(setup, transport, again), strict=True))
    answers = [
        instead.get(instruction.client, one)
        for instruction, one in zip(instructions, answers, strict=True)
    ]
    once_more = [
        replace(instruction, budget=Budget(epochs=1))
        for instruction in instructions
        if setup.config.evaluation.newcomers and not trained.get(instruction.client)
    ]
    after = _ask(setup, transport, once_more)
    return Personalised(
        tuple(one for one in answers if isinstance(one, Measurement)),
        tuple(one for one in answers if isinstance(one, Failure)),
        time.perf_counter() - start,
        tuple(one for one in after if isinstance(one, Measurement)),
        tuple(one for one in after if isinstance(one, Failure)),
        lost,
    )


def _ask(setup: Setup, transport: Transport, instructions: Sequence[Instruction]) -> list[Reply]:
    """Never more at once than in a round."""
    answers: list[Reply] = []
    for first in range(0, len(instructions), setup.config.drawn):
        some = instructions[first : first + setup.config.drawn]
        came = {arrival.index: arrival.reply for arrival in transport.exchange(some)}
        answers += [
            checked(instruction, came.get(index), partial(_why_refused, instruction))
            for index, instruction in enumerate(some)
        ]
    return answers


def personalised_sums(found: Personalised, trained: Mapping[int, int]) -> dict[str, Any]:
    """What goes into ``result.json``; a client counts as one, however many rows it has.

    The worst tenth is the mean of the lowest tenth of all clients' accuracies, rounded up to whole
    clients; the deviation is theirs around the mean.

    Args:
        trained: merged turns of each client that has any.
    """
    accuracies = [one.accuracy for one in found.measurements]
    worst = sorted(accuracies)[: ceil(len(accuracies) / 10)]
    seen = [one.accuracy for one in found.measurements if trained.get(one.client)]
    new = [one.accuracy for one in found.measurements if not trained.get(one.client)]
    return {
        "personalised_accuracy": _mean(accuracies),
        "personalised_worst_tenth": _mean(worst),
        "personalised_deviation": pstdev(accuracies) if accuracies else None,
        "personalised_accuracy_trained": _mean(seen),
        "newcomers": len(new),
        "newcomers_accuracy": _mean(new),
        "newcomers_accuracy_after_epoch": _mean([one.accuracy for one in found.newcomers]),
        "personalised_devices": len(accuracies),
        "personalised_rows": sum(one.rows for one in found.measurements),
        "personalised_wall_s": found.wall_s,
        "personalised": [
            {
                "client": one.client,
                "turns": trained.get(one.client, 0),
                "rows": one.rows,
                "accuracy": one.accuracy,
                "loss": one.loss,
            }
            for one in found.measurements
        ],
        "personalised_lost": list(found.lost),
        "personalised_failures": [
            {"client": one.client, "reason": one.reason} for one in found.failures
        ],
        "newcomers_failures": [
            {"client": one.client, "reason": one.reason} for one in found.newcomer_failures
        ],
    }


def _why_refused(instruction: Instruction, answer: Update | Measurement) -> str | None:
    if isinstance(answer, Update):
        return "answers with no measurement"
    if answer.rows > 0 and 0 <= answer.accuracy <= 1 and isfinite(answer.loss):
        return why_not_its_own(instruction, answer)
    return "its measurement is none"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
