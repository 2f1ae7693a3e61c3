"""Keep weights of layers that a local training does not run in a memory-mapped file. Ours."""

import contextlib
import ctypes
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from droppeft.errors import DroppeftError
from droppeft.files import LEFT_BEHIND_S, make_private


@dataclass
class _Weight:
    """One frozen parameter of a block.

    Attributes:
        mapped: its values, mapped from the file.
        used: its present values, in the file or on the device.
        version: torch's version counter of the parameter when it was given these values.
    """

    parameter: nn.Parameter
    mapped: torch.Tensor
    used: torch.Tensor
    version: int

    @classmethod
    def of(cls, parameter: nn.Parameter, mapped: torch.Tensor) -> "_Weight":
        parameter.data = mapped
        return cls(parameter, mapped, mapped, parameter._version)

    @property
    def changed(self) -> bool:
        """Whether the values were written to or replaced."""
        value = self.parameter
        return value.data_ptr() != self.used.data_ptr() or value._version != self.version

    def use(self, values: torch.Tensor) -> None:
        """Set the parameter's storage to a copy of the same values."""
        self.parameter.data = self.used = values
        self.version = self.parameter._version


class OffloadedWeights:
    """The frozen weights of a model's blocks, of which only some are in memory.

    They are written once to a file, which is mapped and whose name is deleted, so that the file is
    removed when the process ends. On a CPU, a weight's pages are loaded when it is read, and
    :meth:`load_layers` releases the pages that are not needed. (The system may keep them in its
    page cache while there is free memory.) On an accelerator there are copies of the loaded layers
    only.

    A weight that is written to (by a base delta, or by an adapter that is initialised from it) is
    no longer offloaded.

    Args:
        model: on the CPU, without an adapter; everything but the blocks' weights is moved to the
            device.
        blocks: its L blocks.
        device: where the model runs.
        folder: on a disk with room for the weights; created if it does not exist.

    Raises:
        DroppeftError: there is no room for the file, or the system cannot release pages.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, folder: Path
    ) -> None:
        if device.type == "cpu" and platform.system() != "Linux":
            raise DroppeftError(
                f"training.offload=true saves no memory on a CPU under {platform.system()}; "
                "set it to false"
            )
        self._device = device
        # Values with other strides stay in memory: a copy with new strides could change results.
        layers = [
            [value for value in block.parameters() if value.is_contiguous()] for block in blocks
        ]
        mapped = _mapped([value for layer in layers for value in layer], folder)
        self._weights = [[_Weight.of(value, mapped[value]) for value in layer] for layer in layers]
        self.move_rest(model)
        self.load_layers(())

    def move_rest(self, model: nn.Module) -> None:
        """Move everything that is not in the file to the device: adapters, heads, buffers, etc."""
        offloaded = {id(weight.parameter) for layer in self._weights for weight in layer}
        for value in (*model.parameters(), *model.buffers()):
            if id(value) not in offloaded:
                value.data = _copied(value.data, self._device)

    def load_layers(self, layers: Collection[int]) -> None:
        """Load the weights of these layers, after releasing those of all others."""
        on_cpu = self._device.type == "cpu"
        for layer, weights in enumerate(self._weights):
            for weight in weights if layer not in layers else ():
                if weight.changed:
                    continue
                if on_cpu:
                    _release_pages(weight.mapped)
                else:
                    weight.use(weight.mapped)
        for layer in () if on_cpu else sorted(layers):
            for weight in self._weights[layer]:
                if weight.changed:
                    weight.parameter.data = _copied(weight.parameter.data, self._device)
                elif weight.used is weight.mapped:
                    weight.use(_copied(weight.mapped, self._device))


def _mapped(values: Sequence[nn.Parameter], folder: Path) -> dict[nn.Parameter, torch.Tensor]:
    """Write the values to a file, map it, and delete its name."""
    tensors = {str(number): value.detach() for number, value in enumerate(values)}
    path = None
    try:
        make_private(folder)
        _clear(folder)
        handle, path = tempfile.mkstemp(".safetensors", dir=folder)
        os.close(handle)
        safetensors.torch.save_file(tensors, path)
        with safetensors.safe_open(path, framework="pt") as file:
            return {value: file.get_tensor(str(number)) for number, value in enumerate(values)}
    except (OSError, safetensors.SafetensorError) as error:
        needed = sum(value.nbytes for value in values) / 1e9
        raise DroppeftError(
            f"training.offload=true needs {needed:.1f} GB of disk in {folder} ({error}); make "
            "room, or set DROPPEFT_CACHE to another folder"
        ) from None
    finally:
        if path is not None:
            Path(path).unlink()


def _clear(folder: Path) -> None:
    """Delete files of processes that were killed while they wrote."""
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFT_BEHIND_S:
                path.unlink()


def _copied(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values.to(device)


def _release_pages(mapped: torch.Tensor) -> None:
    """Release a tensor's whole pages from this process's memory; reading loads them again."""
    first = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        place, length = ctypes.c_void_p(first), ctypes.c_size_t(size)
        ctypes.CDLL(None).madvise(place, length, mmap.MADV_DONTNEED)
