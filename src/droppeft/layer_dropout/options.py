"""The options of layer dropout in a training loop of your own or a Trainer. Ours."""

import operator
from collections.abc import Sequence
from typing import Any, TypedDict

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.schedules import PART


class GateOptions(TypedDict, total=False):
    """Options of :func:`layer_dropout`, which documents each of them."""

    rates: Sequence[float] | None
    backward_depths: Sequence[float]
    shape: str
    sampling: str
    protect_first: int
    protect_last: int
    every: int
    schedule: str
    schedule_part: float
    total_steps: int | None
    seed: int


DEFAULTS = GateOptions(
    rates=None,
    backward_depths=(1.0,),
    shape="uniform",
    sampling="exact",
    protect_first=1,
    protect_last=1,
    every=1,
    schedule="constant",
    schedule_part=PART,
    total_steps=None,
    seed=0,
)
"""Default values of the options of :func:`layer_dropout`."""


def with_defaults(options: GateOptions) -> GateOptions:
    """Return the options, with the default value of each one that is not given.

    Raises:
        TypeError: if an option does not exist.
    """
    for name in options.keys() - DEFAULTS.keys():
        raise TypeError(f"layer_dropout() got an unexpected keyword argument {name!r}")
    return {**DEFAULTS, **options}


def whole_number(name: str, value: Any) -> int:
    """Return a whole number as an ``int``: 3.0 or True in its place would seed another draw.

    Raises:
        DroppeftError: the value is of another type, such as a float or a bool.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise DroppeftError(
            f"{name} is {value!r}, a {type(value).__name__}; it must be a whole number, an int"
        ) from None
