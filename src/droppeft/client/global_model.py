"""A global model on the backbone of this process, with all layers. Ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from droppeft.adapters.base_delta import base_delta_applied
from droppeft.adapters.by_layer import set_tensors
from droppeft.client.client_model import ClientModel
from droppeft.messages.server_state import GlobalModel


def attach_model(client_model: ClientModel, model: GlobalModel) -> None:
    """Attach the adapter of a global model, with its values, to the backbone."""
    client_model.attach(model.adapter)
    set_tensors(client_model.parameters, model.tensors)


@contextmanager
def attached(client_model: ClientModel, model: GlobalModel) -> Iterator[nn.Module]:
    """Attach a global model with its base delta to the backbone, and yield the whole."""
    attach_model(client_model, model)
    client_model.load_layers()
    with base_delta_applied(client_model.model, model.base_delta):
        yield client_model.model
