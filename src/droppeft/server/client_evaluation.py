"""Evaluate every client's own model on its own test rows: the personalised quality; ours.

This happens once, at the end of a run, and only for the report: the modelled clock does not count
it, and no state depends on it. Clients that never trained are evaluated too.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from statistics import fmean, pstdev
from typing import Any

from droppeft.config import Config
from droppeft.messages.instruction import Instruction, TextGeneration
from droppeft.messages.reply import EvaluationReply, Failure, Reply, Update
from droppeft.messages.server_state import ServerState
from droppeft.methods import Method, Setup
from droppeft.server.validation import check_reply, why_not_its_own
from droppeft.sharing.participation import with_participations
from droppeft.tasks.metrics import TEXT_METRICS, Metric
from droppeft.tasks.registry import task_named
from droppeft.tasks.task import Task
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
    """Have every client measure its own model, and let it write texts if they are asked for.

    A client that has lost its saved state is asked a second time, with all tensors in the
    instruction.

    Args:
        round: the one that would come next.
    """
    start = time.perf_counter()
    generation = _generation(setup.config)

    def ask(state: ServerState, client: int) -> Instruction:
        instruction = method.evaluate_client(setup, state, round, client)
        return replace(instruction, generation=generation)

    instructions = [ask(state, client) for client in range(setup.config.clients)]
    replies = exchange(setup, transport, instructions)
    lost = tuple(reply.client for reply in replies if isinstance(reply, Failure) and reply.lost)
    if lost:
        state = with_participations(state, instructions, replies)
        again = [ask(state, client) for client in lost]
        second = dict(zip(lost, exchange(setup, transport, again), strict=True))
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


def _generation(config: Config) -> TextGeneration | None:
    """The texts that clients are asked for."""
    settings = config.evaluation
    if not settings.personalised_generated:
        return None
    return TextGeneration(
        settings.personalised_generated, config.training.max_length, settings.max_new_tokens
    )


def exchange(
    setup: Setup, transport: Transport, instructions: Sequence[Instruction]
) -> list[Reply]:
    """Return the checked replies to instructions that only evaluate, in their order.

    No more clients are asked at once than in a round.
    """
    replies: list[Reply] = []
    task = task_named(setup.config.task)
    for first in range(0, len(instructions), setup.config.drawn):
        batch = instructions[first : first + setup.config.drawn]
        arrived = {arrival.index: arrival.reply for arrival in transport.exchange(batch)}
        replies += [
            check_reply(instruction, arrived.get(index), partial(_why_refused, task, instruction))
            for index, instruction in enumerate(batch)
        ]
    return replies


def summarise_clients(
    evaluation: ClientEvaluation, participations: Mapping[int, int], metric: Metric
) -> dict[str, Any]:
    """Values for ``result.json``; every client has the same weight, however many rows it has.

    ``personalised_worst_tenth`` is the mean over the tenth of the clients whose models are worst,
    rounded up to whole clients. ``personalised_deviation`` is the standard deviation over clients.
    ``personalised_rouge_l`` and the other scores of texts are means over the clients that wrote
    texts, and ``None`` if there are none.

    Args:
        participations: number of merged updates of each client that has any.
        metric: the task's primary metric.
    """
    measurements = evaluation.measurements
    values = [each.metrics[metric.name] for each in measurements]
    trained = [
        each.metrics[metric.name] for each in measurements if participations.get(each.client)
    ]
    personalised = metric.key("personalised")
    return {
        personalised: _mean(values),
        "personalised_worst_tenth": _mean(metric.worst_first(values)[: ceil(len(values) / 10)]),
        "personalised_deviation": pstdev(values) if values else None,
        f"{personalised}_trained": _mean(trained),
        **{
            score.key("personalised"): _mean(
                [each.metrics[name] for each in measurements if each.texts]
            )
            for name, score in TEXT_METRICS.items()
        },
        "personalised_clients": len(values),
        "personalised_rows": sum(each.rows for each in measurements),
        "personalised_wall_s": evaluation.wall_s,
        "personalised": [
            {
                "client": each.client,
                "participations": participations.get(each.client, 0),
                "rows": each.rows,
                **({"texts": each.texts} if each.texts else {}),
                **each.metrics,
            }
            for each in measurements
        ],
        "personalised_lost": list(evaluation.lost),
        "personalised_failures": [
            {"client": failure.client, "reason": failure.reason} for failure in evaluation.failures
        ],
    }


def _why_refused(
    task: Task, instruction: Instruction, reply: Update | EvaluationReply
) -> str | None:
    if isinstance(reply, Update):
        return "sent an update in place of an evaluation"
    most = instruction.validation_rows
    if most and reply.rows > most:
        return f"claims {reply.rows} validation rows, at most {most} were asked for"
    asked = instruction.generation.rows if instruction.generation else 0
    if not 0 <= reply.texts <= min(asked, reply.rows):
        return f"claims {reply.texts} texts on {reply.rows} rows, at most {asked} were asked for"
    metrics = {metric.name: metric for metric in task.metrics}
    metrics |= TEXT_METRICS if reply.texts else {}
    if (
        reply.rows > 0
        and reply.metrics.keys() == metrics.keys()
        and all(metrics[name].is_possible(value) for name, value in reply.metrics.items())
    ):
        return why_not_its_own(instruction, reply)
    return "its measurement has impossible values"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
