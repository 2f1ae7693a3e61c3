"""A change of the frozen backbone, in force for one client's training only; ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from droppeft.adapters.by_layer import backbone_name
from droppeft.errors import DroppeftError
from droppeft.messages import BaseDelta
from droppeft.models.quantization import is_quantised


@contextmanager
def base_delta_applied(model: nn.Module, delta: BaseDelta | None) -> Iterator[None]:
    """Add a delta to the frozen backbone inside; afterwards its bits are the old ones.

    The old values are kept, not recomputed: w + d − d is not w in floating point. What is added to
    a linear map is (out, in), also where the backbone keeps it the other way round (GPT-2).

    Raises:
        DroppeftError: a name or shape that the backbone does not have, or a quantised weight.
    """
    if delta is None:
        yield
        return
    own = {backbone_name(name): value for name, value in model.named_parameters()}
    turned = {
        backbone_name(f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, Conv1D)
    }
    added = {name: array.T if name in turned else array for name, array in delta.tensors.items()}
    for name, array in added.items():
        if name in own and is_quantised(own[name]):
            raise DroppeftError(
                f"base delta {delta.version}: {name} is quantised, and nothing can be added to it; "
                "set quantization=none, or take a method without base deltas"
            )
        if name not in own or tuple(own[name].shape) != array.shape:
            raise DroppeftError(f"base delta {delta.version}: {name} does not fit the backbone")
    kept = {name: own[name].detach().clone() for name in added}
    try:
        with torch.no_grad():
            for name, array in added.items():
                own[name].add_(torch.from_numpy(array).to(own[name]))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                own[name].copy_(value)
