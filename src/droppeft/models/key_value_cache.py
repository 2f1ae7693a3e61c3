"""Models without their key-value cache, which is of use in generation only; ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep a decoder from filling a key-value cache that nobody will read.

    With one, its attention reads a copy of keys and values, which may be other bits in the end.
    """
    with set_inside(model.config, "use_cache", False):
        yield


@contextmanager
def set_inside(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute of an instance inside; afterwards it has the old one, or none of its own."""
    own = vars(owner)
    missing = object()
    before = own.get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
