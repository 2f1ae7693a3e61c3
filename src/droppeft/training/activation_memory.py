"""Counts the bytes that autograd stores for the backward pass.

The count is exact, repeatable and the same on every torch device. Ours; it uses torch's
``saved_tensors_hooks``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from droppeft.training.checkpointing import Call

Storages = dict[int, torch.UntypedStorage]
"""Storages by address. They are referenced so that no address is reused while counting."""

Kind = tuple[object, ...]
"""Identifies blocks that store equally many bytes for inputs of the same shape."""


class ActivationMeter:
    """Measures the most bytes that a forward pass stores for its backward pass.

    Each storage counts once and with its whole size, even if several views of it are saved. The
    model's parameters and buffers do not count. Copies of weights that autocast makes and stores
    for the backward pass do count.

    With gradient checkpointing, hooks around a block do not see what it stores. The peak is then
    the bytes stored in the forward pass (the inputs of the blocks, and what is stored outside of
    them) plus those of the largest block, because the backward pass recomputes one block at a time.
    To measure a block, one block of each kind is run once more without checkpointing, if the inputs
    are larger than all earlier ones. For n batches of random lengths this happens about ln(n) + 1
    times, and it takes no more memory than the backward pass. The kind of a block is its class, and
    the names and shapes of its trained parameters.

    Attributes:
        peak_bytes: the most bytes so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.peak_bytes = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._of_model = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._calls: list[Call] = []
        self._kinds: dict[nn.Module, Kind] = {}
        self._extra: dict[Kind, dict[torch.Size, int]] = {}

    def note(self, call: Call) -> None:
        """Record the forward pass of a checkpointed block; pass it to :func:`checkpointed`."""
        self._calls.append(call)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the forward pass inside the context, and update :attr:`peak_bytes`.

        Enter this context last: when it is left, blocks are run again under the current autocast.
        """
        stored: Storages = {}
        try:
            with _storing_in(stored):
                yield
            for call in self._calls:
                stored.update(map(_addressed, call.tensors))
            stored_bytes = self._bytes(stored)
            self.peak_bytes = max(self.peak_bytes, stored_bytes)
            for kind, call in {self._kind(call): call for call in self._calls}.items():
                self._add_block(kind, call, stored, stored_bytes)
        finally:
            self._calls.clear()

    def _add_block(self, kind: Kind, call: Call, stored: Storages, stored_bytes: int) -> None:
        """Add what a block stores to ``stored_bytes``, unless the sum cannot exceed the peak."""
        shape = call.tensors[0].shape
        known = self._extra.setdefault(kind, {})
        bounds = [extra for larger, extra in known.items() if _fits(shape, larger)]
        if bounds and stored_bytes + min(bounds) <= self.peak_bytes:
            return
        again = dict(stored)
        device = call.tensors[0].device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _storing_in(again, for_backward=False),
        ):
            call.function(*call.inputs)
        known[shape] = self._bytes(again) - stored_bytes
        self.peak_bytes = max(self.peak_bytes, stored_bytes + known[shape])

    def _bytes(self, stored: Storages) -> int:
        return sum(
            storage.nbytes() for address, storage in stored.items() if address not in self._of_model
        )

    def _kind(self, call: Call) -> Kind:
        """Return the kind of a call's block, and whether its input requires a gradient."""
        if call.block not in self._kinds:
            parameters = call.block.named_parameters()
            trained = [(name, value.shape, value.requires_grad) for name, value in parameters]
            self._kinds[call.block] = (type(call.block), *trained)
        return (call.tensors[0].requires_grad, *self._kinds[call.block])


@contextmanager
def _storing_in(stored: Storages, *, for_backward: bool = True) -> Iterator[None]:
    def pack(tensor: torch.Tensor) -> torch.Tensor | None:
        stored.update([_addressed(tensor)])
        # A node that stored its own output would reference itself, and no backward would free it.
        return tensor if for_backward else None

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _addressed(tensor: torch.Tensor) -> tuple[int, torch.UntypedStorage]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage


def _fits(shape: torch.Size, larger: torch.Size) -> bool:
    return len(shape) == len(larger) and all(map(int.__le__, shape, larger))
