"""The package can be used without the rest of droppeft."""

import inspect
import random
import re
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import droppeft.layer_dropout as package


def test_the_examples_of_the_docstring_train(
    build: Callable[..., nn.Module], batch: dict[str, torch.Tensor]
) -> None:
    _, *examples = (inspect.getdoc(package) or "").split("::\n")
    drawn_gates, chosen_gates = (re.split(r"\n(?=\S)", example)[0] for example in examples)
    model = build("bert")
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names: dict[str, Any] = {"model": model, "optimizer": optimizer, "batches": [batch] * 3}
    exec(textwrap.dedent(drawn_gates), names)
    assert sum(names["dropout"].executed) == 3 * 2  # half of four layers
    exec(textwrap.dedent(chosen_gates), names)
    assert names["gates"].executed[0] == 3  # the protected first block
    assert sum(names["gates"].executed) == 3 * 2
    assert isinstance(names["rng"], random.Random)
    assert not all(map(torch.equal, before, model.parameters()))
