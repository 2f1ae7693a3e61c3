"""What the steps of a training with layer dropout ran and changed."""

from typing import Any

import torch
from transformers import TrainerCallback

from droppeft.layer_dropout import find_blocks
from droppeft.layer_dropout.trainer import LayerDropoutCallback

Gates = tuple[bool, ...]


class StepRecorder(TrainerCallback):
    """Records which layers every step ran and updated; to be added after the tested callback."""

    def __init__(self, callback: LayerDropoutCallback) -> None:
        self.callback = callback
        self.gates: list[Gates] = []
        self.forwards: list[list[int]] = []
        self.moved: list[Gates] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        assert self.callback.dropout is not None
        self.gates.append(self.callback.dropout.active)
        self.executed = self.callback.dropout.executed
        self.values = trained(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        assert self.callback.dropout is not None
        counts = zip(self.callback.dropout.executed, self.executed, strict=True)
        self.forwards.append([now - before for now, before in counts])
        self.moved.append(moved(self.values, trained(model)))


def trained(model: Any) -> list[list[torch.Tensor]]:
    """Return copies of the trained tensors of each layer."""
    _, blocks = find_blocks(model)
    return [
        [value.detach().clone() for value in block.parameters() if value.requires_grad]
        for block in blocks
    ]


def moved(before: list[list[torch.Tensor]], after: list[list[torch.Tensor]]) -> Gates:
    """Return by layer whether its tensors changed: all of them, or none."""
    layers = zip(before, after, strict=True)
    changed = [[not torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in layers]
    assert all(any(layer) == all(layer) for layer in changed)
    return tuple(map(all, changed))
