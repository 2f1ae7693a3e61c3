"""Base deltas: changes of the backbone's weights while one client trains or evaluates. Ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from droppeft.adapters.tensor_names import backbone_name
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import BaseDelta
from droppeft.models.quantization import is_quantised


@contextmanager
def base_delta_applied(model: nn.Module, delta: BaseDelta | None) -> Iterator[None]:
    """Add a base delta to the backbone inside the context, and restore its exact values on exit.

    The original values are saved, since w + d − d differs from w in floating point. The delta of a
    linear map has shape (out, in), also if the backbone stores its weight transposed (GPT-2).

    Raises:
        DroppeftError: if the backbone lacks a tensor of that name and shape, or it is quantised.
    """
    if delta is None:
        yield
        return
    weights = {backbone_name(name): value for name, value in model.named_parameters()}
    transposed = {
        backbone_name(f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, Conv1D)
    }
    added = {
        name: array.T if name in transposed else array for name, array in delta.tensors.items()
    }
    for name, array in added.items():
        if name in weights and is_quantised(weights[name]):
            raise DroppeftError(
                f"base delta {delta.version}: {name} is quantised and cannot be changed; set "
                "quantization=none, or choose a method without base deltas"
            )
        if name not in weights or tuple(weights[name].shape) != array.shape:
            raise DroppeftError(f"base delta {delta.version}: {name} does not fit the backbone")
    saved = {name: weights[name].detach().clone() for name in added}
    try:
        with torch.no_grad():
            for name, array in added.items():
                weights[name].add_(torch.from_numpy(array).to(weights[name]))
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                weights[name].copy_(value)
