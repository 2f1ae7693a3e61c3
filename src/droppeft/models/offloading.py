"""Weights of layers that a turn does not run: in a memory-mapped file, not in memory. Ours."""

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

from droppeft.config import Config
from droppeft.errors import DroppeftError


def check_offload(config: Config) -> None:
    """Refuse to offload where nothing would be kept off.

    Raises:
        DroppeftError: with what to set.
    """
    if not config.training.offload:
        return
    if config.quantization != "none":
        raise DroppeftError(
            "training.offload=true keeps weights in a file as they are, and "
            f"quantization={config.quantization} makes others of them; choose one"
        )
    cached = config.frozen.layers != 0 and config.frozen.cache
    if not cached and config.dropout.every != "round":
        raise DroppeftError(
            "training.offload=true keeps nothing off when every step may run other layers; set "
            "dropout.every=round, or frozen.layers with frozen.cache=true"
        )


LEFT_BEHIND_S = 3600.0
"""Age at which a file that still has its name belongs to nobody."""


@dataclass
class _Weight:
    """One frozen parameter of a block.

    Attributes:
        mapped: its values, in pages of the file.
        version: of the parameter, when it got the values that it should have.
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
        """Whether somebody wrote to it, or gave the parameter other values."""
        value = self.parameter
        return value.data_ptr() != self.used.data_ptr() or value._version != self.version

    def use(self, values: torch.Tensor) -> None:
        """Set the parameter's values, the same ones elsewhere."""
        self.parameter.data = self.used = values
        self.version = self.parameter._version


class OffloadedWeights:
    """The frozen weights of a model's blocks, of which some are kept in memory.

    They are written to a file once, which is mapped and has no name from then on: it goes with the
    process. On a CPU a weight's pages come into memory when it is read, and :meth:`hold` lets go of
    all that are not needed (the system keeps them as cached file pages for as long as nobody wants
    the memory). On an accelerator there are copies of the layers that are held, and no others.

    A weight that is written to (by a base delta, by an adapter that starts from it) stays as it is.

    Args:
        model: on the CPU, without an adapter; all but the blocks' weights go to the device.
        blocks: its L blocks.
        device: where the model is to run.
        folder: on a disk with room for the weights; made if there is none.

    Raises:
        DroppeftError: there is no room for the file, or the system cannot let go of pages.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, folder: Path
    ) -> None:
        if device.type == "cpu" and platform.system() != "Linux":
            raise DroppeftError(
                f"training.offload=true can do nothing on a CPU under {platform.system()}; "
                "set it to false"
            )
        self._device = device
        # Other strides could give other bits.
        layers = [[value for value in one.parameters() if value.is_contiguous()] for one in blocks]
        mapped = _mapped([value for layer in layers for value in layer], folder)
        self._weights = [[_Weight.of(value, mapped[value]) for value in layer] for layer in layers]
        self.bring_rest(model)
        self.hold(())

    def bring_rest(self, model: nn.Module) -> None:
        """Move to the device what is not in the file: new adapters, heads, embeddings, buffers."""
        offloaded = {id(weight.parameter) for layer in self._weights for weight in layer}
        for value in (*model.parameters(), *model.buffers()):
            if id(value) not in offloaded:
                value.data = _copied(value.data, self._device)

    def hold(self, layers: Collection[int]) -> None:
        """Have the weights of these layers at hand, and those of no other; first the others go."""
        on_cpu = self._device.type == "cpu"
        for layer, weights in enumerate(self._weights):
            for weight in weights if layer not in layers else ():
                if weight.changed:
                    continue
                if on_cpu:
                    _let_go(weight.mapped)
                else:
                    weight.use(weight.mapped)
        for layer in () if on_cpu else sorted(layers):
            for weight in self._weights[layer]:
                if weight.changed:
                    weight.parameter.data = _copied(weight.parameter.data, self._device)
                elif weight.used is weight.mapped:
                    weight.use(_copied(weight.mapped, self._device))


def _mapped(values: Sequence[nn.Parameter], folder: Path) -> dict[nn.Parameter, torch.Tensor]:
    """The same values in a file without a name."""
    names = {str(number): value.detach() for number, value in enumerate(values)}
    path = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        handle, path = tempfile.mkstemp(".safetensors", dir=folder)
        os.close(handle)
        safetensors.torch.save_file(names, path)
        with safetensors.safe_open(path, framework="pt") as file:
            return {value: file.get_tensor(str(number)) for number, value in enumerate(values)}
    except (OSError, safetensors.SafetensorError) as error:
        needed = sum(value.nbytes for value in values) / 1e9
        raise DroppeftError(
            f"training.offload=true needs {needed:.1f} GB of disk in {folder} ({error}); make "
            "room, or name a folder elsewhere in DROPPEFT_CACHE"
        ) from None
    finally:
        if path is not None:
            Path(path).unlink()


def _clear(folder: Path) -> None:
    """Delete what processes left that were killed while they wrote."""
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFT_BEHIND_S:
                path.unlink()


def _copied(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values.to(device)


def _let_go(mapped: torch.Tensor) -> None:
    """Take a tensor's whole pages out of this process' memory; reading brings them back."""
    first = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        place, length = ctypes.c_void_p(first), ctypes.c_size_t(size)
        ctypes.CDLL(None).madvise(place, length, mmap.MADV_DONTNEED)
