"""Count what autograd stores for backward: exact, repeatable, the same on every device.

Ours; the hooks are torch's ``saved_tensors_hooks``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from droppeft.training.checkpointing import Call

Storages = dict[int, torch.UntypedStorage]
"""By address. Held, so that no address is used twice while counting."""

Kind = tuple[object, ...]
"""Of a block's forward: those of one kind store as much for inputs of one shape."""


class ActivationMeter:
    """The most bytes that a forward stores for its backward.

    Each storage counts once, whole, however many views of it are saved; the model's own
    parameters and buffers are no activations, but the copies of weights that autocast makes and
    keeps for backward do count.

    Under gradient checkpointing what a block stores is hidden from hooks around it, in the forward
    and when it runs again. Then a forward counts as what it keeps (the inputs of the blocks, and
    whatever is stored outside of them) and the largest of its blocks, since the backward has one at
    a time. To know how large that is, one block of each kind is run once more, with gradients and
    without checkpointing, when the inputs are larger than any before it: for n batches of random
    lengths the forward of one block about ln(n) + 1 times, and no memory that the backward would
    not take as well. A block's kind is its class and which parameters of what shapes are trained in
    it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.peak_bytes = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._calls: list[Call] = []
        self._kinds: dict[nn.Module, Kind] = {}
        self._extra: dict[Kind, dict[torch.Size, int]] = {}

    def note(self, call: Call) -> None:
        """Take note of a block that the backward will run again."""
        self._calls.append(call)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the forward inside; :attr:`peak_bytes` keeps the largest.

        Enter this last: blocks are run again under the autocast that is in force.
        """
        stored: Storages = {}
        try:
            with _storing_in(stored):
                yield
            for call in self._calls:
                stored.update(map(_addressed, call.tensors))
            kept = self._bytes(stored)
            self.peak_bytes = max(self.peak_bytes, kept)
            for kind, call in {self._kind(call): call for call in self._calls}.items():
                self._add_block(kind, call, stored, kept)
        finally:
            self._calls.clear()

    def _add_block(self, kind: Kind, call: Call, stored: Storages, kept: int) -> None:
        """Count a block's forward on top of all that is kept, unless that cannot be the most."""
        shape = call.tensors[0].shape
        known = self._extra.setdefault(kind, {})
        bounds = [extra for larger, extra in known.items() if _fits(shape, larger)]
        if bounds and kept + min(bounds) <= self.peak_bytes:
            return
        again = dict(stored)
        device = call.tensors[0].device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _storing_in(again, for_backward=False),
        ):
            call.function(*call.inputs)
        known[shape] = self._bytes(again) - kept
        self.peak_bytes = max(self.peak_bytes, kept + known[shape])

    def _bytes(self, stored: Storages) -> int:
        return sum(one.nbytes() for place, one in stored.items() if place not in self._owned)

    def _kind(self, call: Call) -> Kind:
        """Of a call; the first block with something trained stores less than those above it."""
        if call.block not in self._kinds:
            parameters = call.block.named_parameters()
            trained = [(name, value.shape, value.requires_grad) for name, value in parameters]
            self._kinds[call.block] = (type(call.block), *trained)
        return (call.tensors[0].requires_grad, *self._kinds[call.block])


@contextmanager
def _storing_in(stored: Storages, *, for_backward: bool = True) -> Iterator[None]:
    def pack(tensor: torch.Tensor) -> torch.Tensor | None:
        stored.update([_addressed(tensor)])
        # A node that keeps its own output holds itself until its backward, which may never come.
        return tensor if for_backward else None

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _addressed(tensor: torch.Tensor) -> tuple[int, torch.UntypedStorage]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage


def _fits(shape: torch.Size, larger: torch.Size) -> bool:
    return len(shape) == len(larger) and all(map(int.__le__, shape, larger))
