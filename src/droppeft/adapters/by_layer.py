"""Trainable tensors addressed by layer: the form in which they are dropped, sent and merged.

Ours; every method of the comparison reads and writes a model through these functions alone.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from droppeft.adapters.prefix import PREFIX
from droppeft.errors import DroppeftError
from droppeft.messages import HEAD, OTHER, LayerKey, Tensors, flatten

Parameters = Mapping[LayerKey, Mapping[str, nn.Parameter]]
"""Trainable parameters by layer, then by parameter name."""


def layer_of(name: str, blocks_path: str) -> LayerKey:
    """Tell where a parameter belongs: its layer's index, ``"head"`` or ``"other"``."""
    for path in (f"{blocks_path}.", PREFIX):
        if name.startswith(path):
            return int(name.removeprefix(path).partition(".")[0])
    return HEAD if ".modules_to_save." in name else OTHER


def backbone_name(name: str) -> str:
    """A backbone parameter's name before peft wrapped its module."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def trainable_by_layer(model: nn.Module, blocks_path: str) -> Parameters:
    """Group the parameters that require a gradient; layers in order, then other, then the head.

    Two names for one storage are one tensor: the group of a tied tensor would be ambiguous.

    Raises:
        DroppeftError: a tensor is shared between names.
    """
    groups: dict[LayerKey, dict[str, nn.Parameter]] = {}
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        # Not by address: weights without values (on the meta device) have none.
        owner = owners.setdefault(parameter.untyped_storage()._cdata, name)
        if owner != name:
            raise DroppeftError(f"{name} and {owner} are one tensor: it belongs to no single layer")
        groups.setdefault(layer_of(name, blocks_path), {})[name] = parameter
    return {key: groups[key] for key in sorted(groups, key=_depth)}


def get_tensors(parameters: Parameters) -> Tensors:
    """Copy the values out, as float32 arrays on the host."""
    return {
        key: {
            name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, parameter in named.items()
        }
        for key, named in parameters.items()
    }


def set_tensors(parameters: Parameters, tensors: Tensors) -> None:
    """Copy values in; what ``tensors`` does not name stays.

    Raises:
        DroppeftError: a name that the model does not have, or another shape; nothing is
            written in that case.
    """
    known = {name: value for named in parameters.values() for name, value in named.items()}
    for _, name, array in flatten(tensors):
        if name not in known:
            raise DroppeftError(f"tensor {name} does not belong to this model's adapter")
        if tuple(known[name].shape) != array.shape:
            raise DroppeftError(
                f"tensor {name} has shape {array.shape}, the model's is {tuple(known[name].shape)}"
            )
    with torch.no_grad():
        for _, name, array in flatten(tensors):
            known[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))


def count_parameters(parameters: Parameters) -> int:
    """Number of trainable values."""
    return sum(value.numel() for named in parameters.values() for value in named.values())


def _depth(key: LayerKey) -> tuple[int, int]:
    if isinstance(key, int):
        return (0, key)
    return (1, 0) if key == OTHER else (2, 0)
