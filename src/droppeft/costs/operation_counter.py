"""Count what is computed, stored and alive while a model runs forward and backward.

Ours; an operation's FLOPs are torch's own formulas (``torch.utils.flop_counter``), and tensors
without memory are counted like real ones.
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
"""Of a model: a block's index, or ``None`` outside of all blocks."""

Phase = Literal["forward", "backward"]


def _experts_flops(tokens: torch.Tensor, weights: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * tokens.numel() * int(weights.shape[-1])


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._grouped_mm: _experts_flops,  # of mixtures of experts; torch has none for it
}
"""FLOPs by operation."""


@dataclass(eq=False)
class Storage:
    """What is known of some bytes.

    Attributes:
        size: how many.
        made_by: the region that made them.
        stored_by: the regions that store them for the backward.
        input_of: the block of which it is the hidden states.
    """

    size: int
    made_by: Region
    stored_by: set[Region] = field(default_factory=set)
    input_of: Region = None


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation inside its context, by region and phase.

    Attributes:
        region, phase: where the model is now.
        flops: of each region and phase.
        alive_bytes: of what was made inside and is still there.
        peak_bytes: most that this ever was.

    Args:
        model: its parameters and buffers are neither made nor stored by anybody.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.region: Region = None
        self.phase: Phase = "forward"
        self.flops: Counter[tuple[Region, Phase]] = Counter()
        self.peak_bytes = 0
        self._own = {_name(one) for one in (*model.parameters(), *model.buffers())}
        self._alive: dict[int, Storage] = {}
        self.alive_bytes = 0
        self._stored: set[Storage] = set()
        self._ends: dict[int, weakref.ref[Any]] = {}

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
        """What is known of a tensor's storage; ``None`` for the model's own."""
        name = _name(tensor)
        if name in self._own:
            return None
        if name not in self._alive:
            storage = tensor.untyped_storage()
            self._alive[name] = Storage(storage.nbytes(), self.region)
            self._ends[name] = weakref.ref(storage, lambda _: self._end(name))
            self.alive_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        return self._alive[name]

    def storing(self) -> Any:
        """A context for the forward, in which everything that autograd stores is noted."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.store(tensor, self.region)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def store(self, tensor: torch.Tensor, region: Region) -> None:
        """Note that a region stores a tensor for the backward."""
        storage = self.storage(tensor)
        if storage is not None:
            storage.stored_by.add(region)
            self._stored.add(storage)

    def flops_in(self, phase: Phase) -> int:
        """Of all regions."""
        return sum(work for (_, when), work in self.flops.items() if when == phase)

    @property
    def stored_bytes(self) -> int:
        """Of all that is stored, each storage once."""
        return sum(storage.size for storage in self._stored)

    def stored_for(self, block: int) -> int:
        """Bytes that are stored because a block runs: of what it made, and its input.

        Not what was made outside of all blocks (masks, positions). No block of transformers stores
        its output too, which would be the next one's input.
        """
        found = [one for one in self._stored if block in one.stored_by]
        return sum(one.size for one in found if block in (one.made_by, one.input_of))

    def _end(self, name: int) -> None:
        self.alive_bytes -= self._alive.pop(name).size
        del self._ends[name]


@contextmanager
def watched(
    counter: OperationCounter, blocks: dict[int, nn.Module], cut: int | None = None
) -> Iterator[None]:
    """Tell a counter which block the model is in, forward and backward.

    Args:
        counter: in force.
        blocks: by index, those that run, from the input up.
        cut: of this block the input is made to require a gradient, if nothing below it is trained.
    """
    last: list[torch.Tensor] = []

    def enter(index: int) -> Callable[..., Any]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> Any:
            if counter.phase == "backward":  # a checkpointed block runs again
                return None
            call, hidden = (args, kwargs), hidden_of((args, kwargs))
            if index == cut and not hidden.requires_grad:
                # A view, since autocast would keep a leaf's copy for all who read it.
                hidden = hidden.detach().requires_grad_().view_as(hidden)
                call = with_hidden(call, hidden)
            if not any(hidden is one for one in last):
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
    """When the gradient of some hidden states is there, the backward goes on in that region."""

    def hook(gradient: torch.Tensor) -> None:
        counter.region = region

    if hidden.requires_grad:
        hidden.register_hook(hook)  # type: ignore[no-untyped-call]


def _name(tensor: torch.Tensor) -> int:
    """Of a storage, while it lives; one without memory has no address."""
    return int(tensor.untyped_storage()._cdata)
