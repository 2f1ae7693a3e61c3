"""Read and write the trainable tensors of a model, grouped by layer.

Ours. Every method reads and writes models only through these functions.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from droppeft.adapters.tensor_names import layer_of
from droppeft.errors import DroppeftError
from droppeft.messages.tensors import OTHER, LayerKey, Tensors, flatten

Parameters = Mapping[LayerKey, Mapping[str, nn.Parameter]]
"""Trainable parameters by layer, then by parameter name."""


def trainable_by_layer(model: nn.Module, blocks_path: str) -> Parameters:
    """Group the parameters that require a gradient: the layers in order, then other, then the head.

    Raises:
        DroppeftError: if two parameters share their storage: a tied tensor belongs to no single
            layer.
    """
    groups: dict[LayerKey, dict[str, nn.Parameter]] = {}
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        # Compares storages, not addresses: tensors on the meta device have no address.
        owner = owners.setdefault(parameter.untyped_storage()._cdata, name)
        if owner != name:
            raise DroppeftError(
                f"{name} and {owner} are the same tensor, which belongs to no single layer"
            )
        groups.setdefault(layer_of(name, blocks_path), {})[name] = parameter
    return {key: groups[key] for key in sorted(groups, key=_depth)}


def get_tensors(parameters: Parameters) -> Tensors:
    """Return a copy of the values, as float32 arrays."""
    return {
        key: {
            name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, parameter in named.items()
        }
        for key, named in parameters.items()
    }


def set_tensors(parameters: Parameters, tensors: Tensors) -> None:
    """Copy values into the parameters. Parameters that ``tensors`` does not name do not change.

    Raises:
        DroppeftError: if a name is unknown or a shape differs. No parameter changes in that case.
    """
    known = {name: value for named in parameters.values() for name, value in named.items()}
    for _, name, array in flatten(tensors):
        if name not in known:
            raise DroppeftError(f"tensor {name} does not belong to this model's adapter")
        if tuple(known[name].shape) != array.shape:
            raise DroppeftError(
                f"tensor {name} has shape {array.shape} instead of {tuple(known[name].shape)}"
            )
    with torch.no_grad():
        for _, name, array in flatten(tensors):
            known[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))


def count_parameters(parameters: Parameters) -> int:
    """Return the number of trainable values."""
    return sum(value.numel() for named in parameters.values() for value in named.values())


def _depth(key: LayerKey) -> tuple[int, int]:
    if isinstance(key, int):
        return (0, key)
    return (1, 0) if key == OTHER else (2, 0)
