"""Record the matrix products and attentions of a training, and do them again, alone.

What is recorded are the operations as the processor does them, below autograd and autocast, forward
and backward: which one, and the shapes, strides and types of its tensors. In the replay the outputs
of products are allocated before. Tensors that had the same place in memory have it again, so that
weights of all layers are as far apart as they were, and what was in a cache may be in it again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "linear"))
ATTENTION = ("_scaled_dot_product_", "_softmax")
"""Beginnings of the names of fused attentions, and of what others have beside their products: the
softmax and its backward."""

Place = tuple[int, torch.dtype]


@dataclass(frozen=True)
class Stored:
    """Where a tensor was: its storage, and shape, strides and offset in it."""

    place: Place
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Stored":
        place = tensor.untyped_storage().data_ptr(), tensor.dtype
        return cls(place, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    @property
    def end(self) -> int:
        """Number of values up to the last one."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + 1 + sum((size - 1) * stride for size, stride in steps)


class Recording(TorchDispatchMode):
    """Inside this context, products and attentions are recorded.

    Attributes:
        calls: operation, arguments, named arguments and output of each, with `Stored` for tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS or name.startswith(ATTENTION):
            found = torch.utils._pytree.tree_map_only(
                torch.Tensor, Stored.of, (args, dict(kwargs or {}), made)
            )
            self.calls.append((func, *found))
        return made

    def replay(self) -> Callable[[], None]:
        """Allocate what the recorded operations need, and return a function that does them."""
        sizes: dict[Place, int] = {}
        for _, *stored in self.calls:
            for one in torch.utils._pytree.tree_leaves(stored):
                if isinstance(one, Stored):
                    sizes[one.place] = max(sizes.get(one.place, 0), one.end)
        torch.manual_seed(0)
        memory = {place: _values(place[1], size) for place, size in sizes.items()}

        def again(stored: Stored) -> torch.Tensor:
            whole = memory[stored.place]
            return whole.as_strided(stored.shape, stored.strides, stored.offset)

        calls = [
            _call(func, *torch.utils._pytree.tree_map_only(Stored, again, tuple(stored)))
            for func, *stored in self.calls
        ]

        def run() -> None:
            with torch.no_grad():
                for func, args, kwargs in calls:
                    func(*args, **kwargs)

        return run

    def flops(self) -> float:
        """Floating-point operations of the products with two matrices, attention left out."""
        total = 0.0
        for func, args, _, made in self.calls:
            if func.overloadpacket.__name__ in PRODUCTS:
                inner = [one.shape for one in args if isinstance(one, Stored)][-2][-1]
                total += 2.0 * inner * torch.Size(made.shape).numel()
        return total


def _values(dtype: torch.dtype, size: int) -> torch.Tensor:
    """Ordinary numbers; zeros, which mask nothing, for a type that has no fractions."""
    made = torch.zeros(size, dtype=dtype)
    return made.normal_(std=0.02) if dtype.is_floating_point else made


def _call(func: Any, args: Any, kwargs: Any, made: Any) -> tuple[Any, Any, Any]:
    """The operation that writes to a tensor which is there, if torch has one."""
    into = getattr(func.overloadpacket, "out", None)
    if func.overloadpacket.__name__ not in PRODUCTS or into is None:
        return func, args, kwargs
    return into, args, {**kwargs, "out": made}
