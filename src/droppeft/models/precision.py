"""Forwards in half precision, and the scaled loss that fp16 needs.

Source: Micikevicius et al. (arXiv:1710.03740), as torch's ``autocast`` and ``GradScaler`` have it;
the numbers for short turns are ours.
"""

from contextlib import nullcontext
from typing import Any

import torch

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

INITIAL_SCALE = 2.0**10
"""Of the loss in fp16, which holds numbers up to 65504. A logit's gradient is 1/B at most, so that
torch's own 2^16 leaves no room when a row is alone. On the built-in encoder and on one of 12 layers
gradients were as near to those in fp32 for any scale from 2^8 to 2^16, and less near for 1."""

BACKOFF = 1 / 16
"""Of the scale after a step that overflowed. With torch's own, a half, a turn of 10 steps might
end before it fits."""


def autocast(precision: str, device: torch.device) -> Any:
    """The forward's precision; adapters, gradients and optimizer stay fp32.

    What runs in half precision is torch's choice: products and attention on every device, while on
    CUDA normalisation, softmax and the like stay fp32, which on the CPU take what they are given.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=HALF[precision])


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """For a turn in fp16, whose small gradients would vanish; does nothing in other precisions.

    It grows as torch's own does, after 2000 steps in a row without overflow: in long turns alone.
    """
    return torch.amp.GradScaler(
        device.type,
        init_scale=INITIAL_SCALE,
        backoff_factor=BACKOFF,
        enabled=precision == "fp16",
    )


def move(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Take a step, unless a gradient has overflowed; tell which it was."""
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before
