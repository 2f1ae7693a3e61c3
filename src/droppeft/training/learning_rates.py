"""How learning rates change over a run, and which parameters have rates of their own. Ours."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from droppeft.adapters.by_layer import Parameters
from droppeft.adapters.tensor_names import LORA_B
from droppeft.messages.instruction import LocalTraining
from droppeft.messages.tensors import HEAD


def rate_factor(settings: LocalTraining, progress: float) -> float:
    """Return the factor of the peak learning rates at a point of the run (0 start, 1 end).

    After a linear warm-up it follows the schedule.
    """
    if progress < settings.warmup_fraction:
        return progress / settings.warmup_fraction
    rest = (progress - settings.warmup_fraction) / (1 - settings.warmup_fraction)
    return SCHEDULES[settings.schedule](rest)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda rest: 1.0,
    "linear": lambda rest: 1.0 - rest,
    "cosine": lambda rest: 0.5 * (1.0 + math.cos(math.pi * rest)),
}
"""Factor of the peak rate, by the fraction of the run after warm-up that has passed."""


def parameter_groups(parameters: Parameters, settings: LocalTraining) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups, one for each learning rate.

    The head's last linear layer has a rate of its own, because it starts from random values. So has
    LoRA's B (LoRA+, arXiv:2402.12354), unless its rate is that of A.
    """
    output = _output_names(parameters)
    groups: dict[float, list[nn.Parameter]] = {}
    for values in parameters.values():
        for name, value in values.items():
            groups.setdefault(_peak_rate(name, output, settings), []).append(value)
    return [{"params": values, "lr": peak, "peak": peak} for peak, values in groups.items()]


def _peak_rate(name: str, output: set[str], settings: LocalTraining) -> float:
    if name in output:
        return settings.head_learning_rate
    return settings.learning_rate * (settings.loraplus_lr_ratio if LORA_B in name else 1.0)


def _output_names(parameters: Parameters) -> set[str]:
    """Return the names of the head's last linear layer.

    This is ``out_proj`` in RoBERTa's head, else everything but a pooler.
    """
    head = parameters.get(HEAD, {})
    last = {name for name in head if ".out_proj." in name}
    return last or {name for name in head if ".pooler." not in name}


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of every group to a factor of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
