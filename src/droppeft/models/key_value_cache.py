"""Run models without their key-value cache, which only generation needs; ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Disable a decoder's key-value cache inside.

    With a cache, attention reads a copy of keys and values, which may change the last bits.
    """
    with set_temporarily(model.config, "use_cache", False):
        yield


@contextmanager
def set_temporarily(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute of an instance inside; restore or delete it afterwards."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
