"""Evaluate a global model on the server, with all layers."""

from droppeft.client.global_model import attached
from droppeft.data.texts import Rows
from droppeft.messages.server_state import GlobalModel
from droppeft.server.prepare import Prepared
from droppeft.training.loop import Evaluation, evaluate


def evaluate_global(prepared: Prepared, model: GlobalModel, rows: Rows) -> Evaluation:
    """Evaluate a global model on the given test rows, in the run's workers if it has several."""
    if prepared.workers is not None:
        return prepared.workers.evaluate(model, rows)
    config = prepared.config
    with attached(prepared.model, model) as whole:
        return evaluate(
            whole,
            prepared.test,
            rows,
            prepared.model.task,
            config.evaluation.batch_size,
            config.training.precision,
        )
