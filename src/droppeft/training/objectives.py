"""What a method adds to the task's loss, as gradients of its own.

Sources: FedProx (arXiv:1812.06127), HetLoRA (arXiv:2401.06432).
"""

from collections.abc import Iterator

import torch
from torch import nn

from droppeft.adapters.by_layer import Parameters
from droppeft.messages import Objective, Tensors


class Terms:
    """The added terms of a turn; only of layers that have a gradient in a step.

    Args:
        objective: of the instruction.
        parameters: what is trained, at the values that it begins with.
        anchors: values that the proximal term pulls to; by default those.
    """

    def __init__(
        self, objective: Objective, parameters: Parameters, anchors: Tensors | None = None
    ) -> None:
        self._objective = objective
        self._trained = [value for named in parameters.values() for value in named.values()]
        self._anchors = list(_values(parameters, anchors)) if objective.proximal > 0 else []
        self._pairs = list(_pairs(parameters)) if objective.rank_penalty else []

    def add_gradients(self) -> None:
        """Add to the gradients of a step, which are not scaled any more."""
        for anchor, value in zip(self._anchors, self._trained, strict=False):
            if value.grad is not None:
                value.grad.add_(value.detach() - anchor, alpha=self._objective.proximal)
        for a, b in self._pairs:
            self._shrink(a, b)

    def _shrink(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Add the gradient of weight·‖B[:, kept:]‖·‖A[kept:]‖; 0 where a norm is 0."""
        penalty = self._objective.rank_penalty
        if penalty is None or a.grad is None or b.grad is None:
            return
        tail_a, tail_b = a.detach()[penalty.kept :], b.detach()[:, penalty.kept :]
        norm_a, norm_b = tail_a.norm(), tail_b.norm()
        smallest = torch.finfo(tail_a.dtype).tiny
        a.grad[penalty.kept :] += penalty.weight * norm_b * tail_a / norm_a.clamp(min=smallest)
        b.grad[:, penalty.kept :] += penalty.weight * norm_a * tail_b / norm_b.clamp(min=smallest)


def _values(parameters: Parameters, given: Tensors | None) -> Iterator[torch.Tensor]:
    """Of each parameter the given value, or the one that it has now."""
    for key, named in parameters.items():
        for name, value in named.items():
            if given is None:
                yield value.detach().clone()
            else:
                yield torch.from_numpy(given[key][name]).to(value)


def _pairs(parameters: Parameters) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """LoRA's A (r, in) and B (out, r), where both are trained."""
    for named in parameters.values():
        for name, value in named.items():
            other = name.replace(".lora_A.", ".lora_B.")
            if other != name and other in named:
                yield value, named[other]
