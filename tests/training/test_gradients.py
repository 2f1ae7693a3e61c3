"""Moments of gradients, compared with numbers derived by hand."""

import numpy as np
import torch
from torch import nn

from droppeft.training.gradients import Gradients


def test_moments_are_over_the_steps_that_a_layer_ran_in() -> None:
    """Layer 0 has two tensors and runs twice, layer 1 once, layer 2 has nothing that is trained."""
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    gradients = Gradients({0: {"a": a, "b": b}, 1: {"c": c}}, 3, torch.device("cpu"))
    steps = [
        (torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]), None),
        (torch.tensor([-3.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor([6.0, 8.0])),
    ]
    for one, other, third in steps:
        a.grad, b.grad, c.grad = one, other, third
        gradients.note(gradients.norms())
    moments = gradients.moments((2, 1, 0))
    np.testing.assert_allclose(moments.norm, [5.0, 10.0, 0.0])
    np.testing.assert_allclose(moments.square, [25.0, 100.0, 0.0])


def test_without_a_step_all_moments_are_0() -> None:
    one = nn.Parameter(torch.ones(2))
    gradients = Gradients({0: {"a": one}}, 1, torch.device("cpu"))
    moments = gradients.moments((0,))
    assert (moments.norm[0], moments.square[0]) == (0.0, 0.0)
