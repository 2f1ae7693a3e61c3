"""Stochastic layer dropout for transformers in any training loop; the only requirement is torch.

Source: DropPEFT (arXiv:2503.10217); each module says which parts are ours. A plain training loop::

    from droppeft.layer_dropout import layer_dropout

    model.train()
    with layer_dropout(model, optimizer, mean=0.5) as dropout:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

For transformers' Trainer, import ``droppeft.layer_dropout.trainer``. To draw the gates yourself,
use the lower-level functions::

    import random
    from droppeft.layer_dropout import find_blocks, gated, layer_rates, sample_active

    _, blocks = find_blocks(model)
    rates = layer_rates(0.5, "incremental", len(blocks), protected={0})
    rng = random.Random(0)
    model.train()
    with gated(blocks) as gates:
        for batch in batches:
            gates.active = sample_active(rates, "exact", rng)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model.eval()  # outside `gated`, every layer runs
"""

import importlib
from typing import TYPE_CHECKING, Any

from droppeft.layer_dropout.calibration import Calibration, calibrated_rates
from droppeft.layer_dropout.gates import SAMPLINGS, sample_active
from droppeft.layer_dropout.modes import LayerModes, Mode, starts_of
from droppeft.layer_dropout.rates import (
    SHAPES,
    explicit_rates,
    layer_rates,
    protected_ends,
    weighted_rates,
)
from droppeft.layer_dropout.schedules import SCHEDULES, scheduled_rates

if TYPE_CHECKING:
    from droppeft.layer_dropout.architectures import ARCHITECTURES, REFUSED, Architecture
    from droppeft.layer_dropout.blocks import Gates, gated
    from droppeft.layer_dropout.dropout import DrawnGates, layer_dropout
    from droppeft.layer_dropout.stacks import find_blocks, find_stacks

__all__ = [
    "ARCHITECTURES",
    "REFUSED",
    "SAMPLINGS",
    "SCHEDULES",
    "SHAPES",
    "Architecture",
    "Calibration",
    "DrawnGates",
    "Gates",
    "LayerModes",
    "Mode",
    "calibrated_rates",
    "explicit_rates",
    "find_blocks",
    "find_stacks",
    "gated",
    "layer_dropout",
    "layer_rates",
    "protected_ends",
    "sample_active",
    "scheduled_rates",
    "starts_of",
    "weighted_rates",
]

_NEED_TORCH = {
    "architectures": ("ARCHITECTURES", "REFUSED", "Architecture"),
    "blocks": ("Gates", "gated"),
    "dropout": ("DrawnGates", "layer_dropout"),
    "stacks": ("find_blocks", "find_stacks"),
}
"""Names by module that are loaded when they are first used: PyTorch takes seconds."""


def __getattr__(name: str) -> Any:
    for module, names in _NEED_TORCH.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
