"""Count FLOPs, stored bytes and allocated bytes while a model runs forward and backward.

Ours. FLOPs come from torch's formulas (``torch.utils.flop_counter``). Fake tensors are counted like
real ones.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from droppeft.layer_dropout.architectures import hidden_of, with_hidden

Region = int | None
"""A part of the model: a block's index, or ``None`` outside of all blocks."""

Phase = Literal["forward", "backward"]


def _experts_flops(tokens: torch.Tensor, weights: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * tokens.numel() * int(weights.shape[-1])


_attention_flops = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]
_attention_backward_flops = flop_registry[
    torch.ops.aten._scaled_dot_product_flash_attention_backward
]

FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch has no formulas for these.
    torch.ops.aten._grouped_mm: _experts_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Formulas of FLOPs by operation."""


@dataclass(eq=False)
class Storage:
    """The memory behind one or more tensors.

    Attributes:
        size: in bytes.
        made_by: the region that allocated it.
        stored_by: the regions that store it for the backward.
        input_of: the block whose input hidden states it contains.
    """

    size: int
    made_by: Region
    stored_by: set[Region] = field(default_factory=set)
    input_of: Region = None


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation inside its context, by region and phase.

    Attributes:
        region, phase: what is running now.
        flops: by region and phase.
        alive_bytes: allocated inside the context and not freed yet.
        peak_bytes: maximum of ``alive_bytes``.

    Args:
        model: its parameters and buffers are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.region: Region = None
        self.phase: Phase = "forward"
        self.flops: Counter[tuple[Region, Phase]] = Counter()
        self.peak_bytes = 0
        self._excluded = {_key(value) for value in (*model.parameters(), *model.buffers())}
        self._alive: dict[int, Storage] = {}
        self.alive_bytes = 0
        self._stored: set[Storage] = set()
        self._finalizers: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, then count it."""
        output = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            work = formula(*args, **(kwargs or {}), out_val=output)
            self.flops[self.region, self.phase] += work
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.storage(leaf)
        return output

    def storage(self, tensor: torch.Tensor) -> Storage | None:
        """The record of a tensor's storage; ``None`` for the model's parameters and buffers."""
        key = _key(tensor)
        if key in self._excluded:
            return None
        if key not in self._alive:
            storage = tensor.untyped_storage()
            self._alive[key] = Storage(storage.nbytes(), self.region)
            self._finalizers[key] = weakref.ref(storage, lambda _: self._freed(key))
            self.alive_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        return self._alive[key]

    def storing(self) -> Any:
        """A context for the forward, which records everything that autograd stores."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.store(tensor, self.region)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def store(self, tensor: torch.Tensor, region: Region) -> None:
        """Record that a region stores a tensor for the backward."""
        storage = self.storage(tensor)
        if storage is not None:
            storage.stored_by.add(region)
            self._stored.add(storage)

    def flops_in(self, phase: Phase) -> int:
        """FLOPs of a phase, over all regions."""
        return sum(work for (_, when), work in self.flops.items() if when == phase)

    @property
    def stored_bytes(self) -> int:
        """Bytes that are stored for the backward, each storage counted once."""
        return sum(storage.size for storage in self._stored)

    def stored_for(self, block: int) -> int:
        """Bytes that are stored because a block runs: tensors that it made, and its input.

        Tensors made outside of all blocks (masks, positions) are left out. No block of transformers
        stores its output, which would be counted a second time as the next block's input.
        """
        stored = [storage for storage in self._stored if block in storage.stored_by]
        return sum(
            storage.size for storage in stored if block in (storage.made_by, storage.input_of)
        )

    def _freed(self, key: int) -> None:
        self.alive_bytes -= self._alive.pop(key).size
        del self._finalizers[key]


@contextmanager
def watched(
    counter: OperationCounter, blocks: dict[int, nn.Module], cut: int | None = None
) -> Iterator[None]:
    """Set a counter's region while blocks run, in forward and backward.

    Args:
        counter: whose context is entered.
        blocks: the blocks that run, by index, in order.
        cut: index of the block whose input is made to require a gradient even if nothing below it
            is trained.
    """
    last: list[torch.Tensor] = []

    def enter(index: int) -> Callable[..., Any]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> Any:
            if counter.phase == "backward":  # a checkpointed block runs again
                return None
            call, hidden = (args, kwargs), hidden_of((args, kwargs))
            if index == cut and not hidden.requires_grad:
                # A view, since autocast would cache its copy of a leaf.
                hidden = hidden.detach().requires_grad_().view_as(hidden)
                call = with_hidden(call, hidden)
            if not any(hidden is output for output in last):
                _on_gradient(counter, hidden, None)
            storage = counter.storage(hidden)
            if storage is not None:
                storage.input_of = index
            counter.region = index
            return call

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, output: Any) -> None:
            if counter.phase == "forward":
                hidden = output[0] if isinstance(output, tuple) else output
                _on_gradient(counter, hidden, index)
                last[:] = [hidden]
                counter.region = None

        return hook

    hooks = []
    for index, block in blocks.items():
        hooks.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
        hooks.append(block.register_forward_hook(leave(index)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _on_gradient(counter: OperationCounter, hidden: torch.Tensor, region: Region) -> None:
    """Set the region when the backward has computed the gradient of these hidden states."""

    def hook(gradient: torch.Tensor) -> None:
        counter.region = region

    if hidden.requires_grad:
        hidden.register_hook(hook)  # type: ignore[no-untyped-call]


def _key(tensor: torch.Tensor) -> int:
    """Identify a storage while it lives. Storages of fake tensors have no address."""
    return int(tensor.untyped_storage()._cdata)
