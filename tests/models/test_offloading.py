"""Offloaded weights: the same values, in memory only for layers that are loaded."""

import os
import re
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import droppeft.models.offloading
from adapter_contract import Attached, backbone, case, usable_on
from droppeft.adapters.types import TYPES
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks
from droppeft.methods.rules import check_offload
from droppeft.models.offloading import OffloadedWeights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WIDTH = 512
BLOCK_BYTES = WIDTH * WIDTH * 4


class Stack(nn.Module):
    """Three blocks of a megabyte, and a linear map outside of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.rest = nn.Linear(4, 4)
        self.requires_grad_(False)

    def weights(self) -> list[torch.Tensor]:
        return [block.weight.detach() for block in self.blocks]


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack()


def offloaded(stack: Stack, folder: Path, device: torch.device = CPU) -> OffloadedWeights:
    return OffloadedWeights(stack, list(stack.blocks), device, folder)


def resident_bytes() -> int:
    """Resident bytes of mapped files whose names are deleted."""
    text = Path("/proc/self/smaps").read_text(encoding="ascii")
    found = re.findall(r"\.safetensors \(deleted\)\n(?:.*\n)*?Rss:\s+(\d+) kB", text)
    return sum(map(int, found)) * 1024


def test_only_loaded_layers_stay_in_memory(stack: Stack, tmp_path: Path) -> None:
    before = resident_bytes()
    weights = offloaded(stack, tmp_path)
    assert resident_bytes() - before < BLOCK_BYTES / 4
    for loaded, blocks in (((0, 1, 2), 3), ((1,), 1), ((), 0), (range(3), 3), ((0, 2), 2)):
        sums = [float(weight.sum()) for weight in stack.weights()]  # reading loads all pages
        weights.load_layers(loaded)
        assert abs(resident_bytes() - before - blocks * BLOCK_BYTES) < BLOCK_BYTES / 4, loaded
        assert [float(weight.sum()) for weight in stack.weights()] == sums


def test_values_are_those_that_were_loaded(stack: Stack, tmp_path: Path) -> None:
    expected = [weight.clone() for weight in stack.weights()]
    offloaded(stack, tmp_path).load_layers((0,))
    assert all(map(torch.equal, stack.weights(), expected))


def test_the_file_has_no_name(stack: Stack, tmp_path: Path) -> None:
    offloaded(stack, tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


@pytest.fixture
def copied_addresses(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses of tensors that were copied to an accelerator, which is simulated."""
    addresses: set[int] = set()

    def copied(values: torch.Tensor, device: torch.device) -> torch.Tensor:
        if device == CPU:
            return values
        copy = values.clone()
        addresses.add(copy.data_ptr())
        return copy

    monkeypatch.setattr(droppeft.models.offloading, "_copied", copied)
    return addresses


def test_only_loaded_layers_are_on_an_accelerator(
    stack: Stack, tmp_path: Path, copied_addresses: set[int]
) -> None:
    expected = [weight.clone() for weight in stack.weights()]
    weights = offloaded(stack, tmp_path, CUDA)
    assert all(value.data_ptr() in copied_addresses for value in stack.rest.parameters())
    for loaded in ((0, 1), (), (1,), range(3), (2,)):
        weights.load_layers(loaded)
        mapped = [weight.mapped.data_ptr() for [weight] in weights._weights]
        now = [weight.data_ptr() for weight in stack.weights()]
        assert [layer for layer in range(3) if now[layer] != mapped[layer]] == list(loaded)
        assert {now[layer] for layer in loaded} <= copied_addresses
        assert all(map(torch.equal, stack.weights(), expected))


def test_layers_are_released_before_others_are_loaded(
    stack: Stack, tmp_path: Path, copied_addresses: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that an accelerator never has more than the layers of one call."""
    weights = offloaded(stack, tmp_path, CUDA)
    weights.load_layers((2,))
    copied, counts = droppeft.models.offloading._copied, []

    def counting(values: torch.Tensor, device: torch.device) -> torch.Tensor:
        mapped = [weight.mapped.data_ptr() for [weight] in weights._weights]
        now = [weight.data_ptr() for weight in stack.weights()]
        counts.append(sum(a != b for a, b in zip(now, mapped, strict=True)))
        return copied(values, device)

    monkeypatch.setattr(droppeft.models.offloading, "_copied", counting)
    weights.load_layers((0, 1))
    assert counts == [0, 1]


def test_a_weight_that_was_replaced_is_moved_to_the_accelerator(
    stack: Stack, tmp_path: Path, copied_addresses: set[int]
) -> None:
    weights = offloaded(stack, tmp_path, CUDA)
    stack.blocks[0].weight.data = torch.ones(WIDTH, WIDTH)
    weights.load_layers((0,))
    assert stack.weights()[0].data_ptr() in copied_addresses
    assert torch.equal(stack.weights()[0], torch.ones(WIDTH, WIDTH))


def test_files_of_killed_processes_are_deleted(stack: Stack, tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 60)):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(b"weights")
        os.utime(file, times=(time.time() - age,) * 2)
    offloaded(stack, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new.safetensors"]


def test_a_loaded_layer_is_not_copied_again(
    stack: Stack, tmp_path: Path, copied_addresses: set[int]
) -> None:
    weights = offloaded(stack, tmp_path, CUDA)
    weights.load_layers((0, 1))
    first = [weight.data_ptr() for weight in stack.weights()]
    weights.load_layers((0, 2))
    assert stack.weights()[0].data_ptr() == first[0]


def test_modules_that_are_added_later_are_moved_to_the_accelerator(
    stack: Stack, tmp_path: Path, copied_addresses: set[int]
) -> None:
    weights = offloaded(stack, tmp_path, CUDA)
    copied_addresses.clear()
    stack.late = nn.Linear(2, 2)
    stack.register_buffer("counter", torch.zeros(1))
    weights.move_rest(stack)
    assert {
        value.data_ptr() for value in (*stack.late.parameters(), *stack.buffers())
    } <= copied_addresses
    assert not {weight.data_ptr() for weight in stack.weights()} & copied_addresses


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_weight_that_was_changed_is_not_released(
    stack: Stack, tmp_path: Path, device: torch.device, copied_addresses: set[int]
) -> None:
    weights = offloaded(stack, tmp_path, device)
    weights.load_layers(range(3))
    with torch.no_grad():
        stack.blocks[0].weight.add_(1)
    stack.blocks[1].weight.data = torch.ones(WIDTH, WIDTH)
    expected = [weight.clone() for weight in stack.weights()]
    weights.load_layers(())
    assert all(map(torch.equal, stack.weights(), expected))


def test_a_weight_with_other_strides_is_not_offloaded(stack: Stack, tmp_path: Path) -> None:
    stack.blocks[1].weight.data = stack.blocks[1].weight.data.T
    address = stack.blocks[1].weight.data_ptr()
    offloaded(stack, tmp_path)
    assert stack.blocks[1].weight.data_ptr() == address
    assert not stack.blocks[1].weight.is_contiguous()


@pytest.mark.sample("lora-*", "bottleneck-bert")
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", [n for n in usable_on("none") if TYPES[n].kind != "global"])
def test_no_adapter_type_changes_weights_unseen(name: str, family: str, tmp_path: Path) -> None:
    """Pages that were written to must not be released: the file has the old values."""
    base = backbone(family)
    weights = OffloadedWeights(base, find_blocks(base)[1], CPU, tmp_path)
    every = [weight for layer in weights._weights for weight in layer]
    before = [weight.mapped.clone() for weight in every]
    attached = Attached(case(name, family), base=base)
    attached.scramble()
    attached.train([(True,) * len(attached.blocks)])
    for weight, values in zip(every, before, strict=True):
        assert weight.changed or torch.equal(weight.mapped, values)
    weights.load_layers(())


def test_a_full_disk_is_reported_in_one_sentence(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(droppeft.models.offloading.safetensors.torch, "save_file", full)
    with pytest.raises(DroppeftError, match=r"needs 0\.0 GB of disk in .*No space left.*CACHE"):
        offloaded(stack, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cpu_of_another_system_is_refused(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(DroppeftError, match="on a CPU under Darwin; set it to false"):
        offloaded(stack, tmp_path)


def test_an_accelerator_of_another_system_is_not_refused(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied_addresses: set[int]
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    offloaded(stack, tmp_path, CUDA)


OFFLOAD = "training.offload=true"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "saves no memory when every step may run other layers; set dropout.every=round"),
        (["frozen.layers=2", "frozen.cache=false"], "saves no memory"),
        (["dropout.every=5"], "saves no memory"),
        (["dropout.every=round", "quantization=4bit"], "combined with quantization=4bit"),
    ],
)
def test_offloading_that_saves_nothing_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(DroppeftError, match=sentence):
        check_offload(load_config(None, [OFFLOAD, *overrides], "droppeft"))
    check_offload(load_config(None, overrides, "droppeft"))


@pytest.mark.parametrize("override", ["frozen.layers=2", "dropout.every=round"])
def test_offloading_that_saves_is_not_refused(override: str) -> None:
    check_offload(load_config(None, [OFFLOAD, override], "droppeft"))
