"""Choose the round whose model a run delivers, by the loss on clients' validation rows. Ours.

After every evaluated round, the same few clients measure the global model on their validation rows.
No test row has a part in the choice. Nothing waits for these measurements until the run ends, so
that the clocks do not count them; the bytes of the instructions are counted.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from droppeft import seeds
from droppeft.config import Config
from droppeft.federated_method import evaluation_only, full_instruction
from droppeft.messages.instruction import Instruction, instruction_bytes
from droppeft.messages.reply import EvaluationReply, Failure
from droppeft.messages.server_state import ServerState
from droppeft.methods import Setup
from droppeft.runs.ledger import RoundRow
from droppeft.server.client_evaluation import exchange
from droppeft.transports.base import Transport

MARGIN = 0.02
"""An earlier round is delivered only if its loss is lower than the last one's by more than this."""


@dataclass(frozen=True)
class Validation:
    """The global model on clients' validation rows.

    Attributes:
        loss: mean over these rows; ``None`` if nothing was measured, or if a client sent no valid
            answer, since the losses of rounds are compared on the same rows only. A client that
            never measures, such as a site with too few rows, does not count.
        download_bytes: bytes of the instructions.
        wall_s: seconds on this machine.
    """

    loss: float | None = None
    download_bytes: int = 0
    wall_s: float = 0.0


def validate(setup: Setup, transport: Transport, state: ServerState, round: int) -> Validation:
    """Have the validation clients measure the global model.

    Args:
        round: the one after which the model is measured.
    """
    config = setup.config
    clients = validation_clients(config)
    if not clients:
        return Validation()
    start = time.perf_counter()
    rows = rows_of_each(config)
    instructions = [_instruction(setup, state, round, client, rows) for client in clients]
    replies = exchange(setup, transport, instructions)
    measured = [reply for reply in replies if isinstance(reply, EvaluationReply)]
    total = sum(reply.rows for reply in measured)
    missing = [reply for reply in replies if isinstance(reply, Failure) and not reply.for_good]
    known = bool(measured) and not missing
    return Validation(
        sum(reply.metrics["loss"] * reply.rows for reply in measured) / total if known else None,
        sum(map(instruction_bytes, instructions)),
        time.perf_counter() - start,
    )


def validation_clients(config: Config) -> Sequence[int]:
    """Return the clients that measure the global model, drawn from the seed alone."""
    rng = seeds.numpy_generator(config.seed, purpose="validation clients")
    drawn = rng.choice(config.clients, size=_count(config), replace=False)
    return [int(client) for client in np.sort(drawn)]


def rows_of_each(config: Config) -> int:
    """Return the most rows that a client measures, so that all together are ``evaluation.rows``."""
    return -(-config.evaluation.rows // _count(config))


def _count(config: Config) -> int:
    return min(config.evaluation.validation_clients, config.clients)


def delivered_round(rows: Sequence[RoundRow]) -> int:
    """Return the round whose model is delivered.

    It is the last round, unless an earlier one has a validation loss that is lower by more than
    :data:`MARGIN`. If the last round has no validation loss, because its model diverged or a client
    was missing, it is the round with the lowest one.

    Args:
        rows: of all rounds, 1 or more.
    """
    last, best = rows[-1], best_round(rows)
    if best is None or best.validation_loss is None:
        return last.round
    if last.validation_loss is None or last.validation_loss > best.validation_loss + MARGIN:
        return best.round
    return last.round


def best_round(rows: Sequence[RoundRow]) -> RoundRow | None:
    """Return the round with the lowest validation loss, the earliest of equal ones.

    ``None`` if no round was measured.
    """
    measured = [(row.validation_loss, row) for row in rows if row.validation_loss is not None]
    return min(measured, key=lambda pair: pair[0])[1] if measured else None


def _instruction(
    setup: Setup, state: ServerState, round: int, client: int, rows: int
) -> Instruction:
    instruction = evaluation_only(full_instruction(setup, state, round, client))
    return replace(instruction, validation_rows=rows)
