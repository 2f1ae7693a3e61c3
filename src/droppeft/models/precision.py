"""Forwards in half precision, and the loss scaling that fp16 needs.

Source: Micikevicius et al. (arXiv:1710.03740), as implemented in torch's ``autocast`` and
``GradScaler``. The constants for short local trainings are ours.
"""

from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch

from droppeft.models.quantization import is_quantised

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32, **HALF}

INITIAL_SCALE = 2.0**10
"""Initial scale of the loss in fp16, whose largest number is 65504. A logit's gradient is at most
1/B, so that torch's default of 2^16 would overflow with a single row. On the built-in encoder and
one of 12 layers, gradients were equally close to fp32 for scales from 2^8 to 2^16, and less close
for 1."""

BACKOFF = 1 / 16
"""Factor of the scale after a step that overflowed. With torch's default of 1/2, a local training
of 10 steps might end before the scale is small enough."""


def hold_in(model: Any, dtype: torch.dtype, trained: Collection[str] = ()) -> None:
    """Hold the frozen weights of a model in a data type, so that no step casts them.

    Quantised weights, buffers, and what transformers always holds in fp32 keep their types.

    Args:
        model: of transformers, without an adapter; changed in place.
        dtype: the type.
        trained: names of modules that are trained, and therefore stay in fp32.
    """
    if dtype == torch.float32:
        return
    kept = {*trained, *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16:
        kept |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    for name, value in model.named_parameters():
        inside = any(f".{part}." in f".{name}." for part in kept)
        if value.is_floating_point() and not is_quantised(value) and not inside:
            value.data = value.data.to(dtype)


def autocast(precision: str, device: torch.device) -> Any:
    """A context for the forward in this precision; adapters, gradients and optimizer stay fp32.

    torch chooses what runs in half precision: products and attention on every device. On CUDA,
    normalisation, softmax and the like run in fp32; on the CPU they run in their input's precision.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=HALF[precision])


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scale the loss in fp16, where small gradients would vanish; disabled in other precisions.

    As torch's default, the scale grows after 2000 steps without overflow.
    """
    return torch.amp.GradScaler(
        device.type,
        init_scale=INITIAL_SCALE,
        backoff_factor=BACKOFF,
        enabled=precision == "fp16",
    )


def optimizer_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Take a step unless a gradient has overflowed; return whether the step was taken."""
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before
