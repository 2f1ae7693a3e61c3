"""Terms that a method adds to the task's loss, computed as gradients.

Sources: FedProx (arXiv:1812.06127), HetLoRA (arXiv:2401.06432).
"""

from collections.abc import Iterator

import torch
from torch import nn

from droppeft.adapters.by_layer import Parameters
from droppeft.adapters.tensor_names import LORA_A, LORA_B
from droppeft.messages.instruction import Objective
from droppeft.messages.tensors import Tensors


class Terms:
    """The added terms of one local training.

    In each step they act only on parameters that have a gradient, so not on dropped layers.

    Args:
        objective: the objective of the instruction.
        parameters: the trained parameters, with the values that training begins with.
        anchors: the values that the proximal term pulls towards; by default the current values.
    """

    def __init__(
        self, objective: Objective, parameters: Parameters, anchors: Tensors | None = None
    ) -> None:
        self._objective = objective
        self._trained = [value for named in parameters.values() for value in named.values()]
        self._anchors = list(_values(parameters, anchors)) if objective.proximal > 0 else []
        self._pairs = list(_pairs(parameters)) if objective.rank_penalty else []

    def add_gradients(self) -> None:
        """Add the gradients of the terms to those of a step, after the loss scale is removed."""
        for anchor, value in zip(self._anchors, self._trained, strict=False):
            if value.grad is not None:
                value.grad.add_(value.detach() - anchor, alpha=self._objective.proximal)
        for a, b in self._pairs:
            self._add_rank_penalty(a, b)

    def _add_rank_penalty(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Add the gradient of weight·‖B[:, m:]‖·‖A[m:]‖, which is 0 where a norm is 0."""
        penalty = self._objective.rank_penalty
        if penalty is None or a.grad is None or b.grad is None:
            return
        first = penalty.unpenalised
        tail_a, tail_b = a.detach()[first:], b.detach()[:, first:]
        norm_a, norm_b = tail_a.norm(), tail_b.norm()
        smallest = torch.finfo(tail_a.dtype).tiny
        a.grad[first:] += penalty.weight * norm_b * tail_a / norm_a.clamp(min=smallest)
        b.grad[:, first:] += penalty.weight * norm_a * tail_b / norm_b.clamp(min=smallest)


def _values(parameters: Parameters, given: Tensors | None) -> Iterator[torch.Tensor]:
    """Yield the given value of each parameter, or by default a copy of its current value."""
    for key, named in parameters.items():
        for name, value in named.items():
            if given is None:
                yield value.detach().clone()
            else:
                yield torch.from_numpy(given[key][name]).to(value)


def _pairs(parameters: Parameters) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yield the A (r, in) and B (out, r) of each LoRA of which both are trained."""
    for named in parameters.values():
        for name, value in named.items():
            other = name.replace(LORA_A, LORA_B)
            if other != name and other in named:
                yield value, named[other]
