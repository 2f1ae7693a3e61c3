"""Evaluate a global model on the server, with all layers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from droppeft.adapters.base_delta import base_delta_applied
from droppeft.adapters.by_layer import set_tensors
from droppeft.data.texts import Rows
from droppeft.messages.server_state import GlobalModel
from droppeft.server.prepare import Prepared
from droppeft.training.loop import Evaluation, evaluate


def evaluate_global(prepared: Prepared, model: GlobalModel, rows: Rows) -> Evaluation:
    """Evaluate a global model on the given test rows."""
    config = prepared.config
    with attached(prepared, model) as whole:
        return evaluate(
            whole,
            prepared.test,
            rows,
            prepared.model.task,
            config.evaluation.batch_size,
            config.training.precision,
        )


@contextmanager
def attached(prepared: Prepared, model: GlobalModel) -> Iterator[nn.Module]:
    """Attach a global model to the backbone and yield the whole."""
    client_model = prepared.model
    client_model.attach(model.adapter)
    set_tensors(client_model.parameters, model.tensors)
    client_model.load_layers()
    with base_delta_applied(client_model.model, model.base_delta):
        yield client_model.model
