"""Federated fine-tuning of language models with stochastic transformer layer dropout."""

import importlib
from typing import TYPE_CHECKING, Any

from droppeft.errors import DroppeftError

if TYPE_CHECKING:
    from droppeft.api import Model, Result, Settings, load, register, resume, run

__version__ = "0.1.0"

__all__ = [
    "DroppeftError",
    "Model",
    "Result",
    "Settings",
    "load",
    "register",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    """Load a function when it is first used: PyTorch and transformers take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
