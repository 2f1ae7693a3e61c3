"""How long a run will take in this process, estimated before round 1 from evaluations. Ours."""

import math

from droppeft.config import Config
from droppeft.server.delivered_round import rows_of_each, validation_clients
from droppeft.server.prepare import Prepared
from droppeft.training.loop import Evaluation

BACKWARD = 2.0
"""Time of a trained layer's backward pass, in times of its forward pass."""


def estimate_wall_s(prepared: Prepared, measured: Evaluation) -> float | None:
    """Estimate the seconds of all rounds and of the final evaluations.

    Texts of training and evaluation are taken to be equally long, and every layer that is not
    frozen to be trained in every step.

    Args:
        prepared: the server before round 1, whose clients run on this machine.
        measured: the evaluation of the model before training, by as many workers as the run has.

    Returns:
        ``None`` if the clients run elsewhere.
    """
    config = prepared.config
    if config.transport != "in_process":
        return None
    per_row, workers = measured.wall_s / measured.rows, prepared.loaded.workers
    # At the end of a round, workers for which no client is left have nothing to do.
    at_a_time = config.drawn / math.ceil(config.drawn / workers)
    trained = 1 - config.frozen.count / prepared.setup.num_layers
    alone = per_row * workers / at_a_time
    training = config.rounds * _rows_per_round(prepared) * alone * (1 + BACKWARD * trained)
    return training + _evaluated_rows(prepared, measured.rows) * per_row


def _rows_per_round(prepared: Prepared) -> float:
    """Rows that the clients of a round train on, with repetition."""
    config: Config = prepared.config
    settings, clients = config.training, prepared.loaded.clients
    if settings.local_epochs is None:
        each: float = (settings.local_steps or 0) * settings.batch_size
    else:
        each = settings.local_epochs * sum(len(one.train) for one in clients) / len(clients)
    return config.drawn * each


def final_rows(prepared: Prepared) -> int:
    """Number of test rows of the evaluation at the end."""
    return min(prepared.config.evaluation.final_rows or len(prepared.test), len(prepared.test))


def _evaluated_rows(prepared: Prepared, sampled: int) -> float:
    """Rows of all evaluations after round 1 began."""
    config, rows = prepared.config, 0
    if prepared.method.has_global_model(config):
        evaluations = math.ceil(config.rounds / config.evaluation.every)
        rows += evaluations * (sampled + _validation_rows(prepared)) + final_rows(prepared)
    if config.evaluation.personalised:
        rows += sum(len(one.test) for one in prepared.loaded.clients)
    return rows


def _validation_rows(prepared: Prepared) -> int:
    """Rows on which clients measure the global model after an evaluated round."""
    config, clients = prepared.config, prepared.loaded.clients
    asked = validation_clients(config)
    return sum(min(rows_of_each(config), len(clients[one].validation)) for one in asked)
