"""Quantised weights behave like frozen weights, and quantised layers are dropped like others."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapter_contract import copies, logits, loss, same, texts, without_dropout
from droppeft.adapters.attach import attach
from droppeft.adapters.by_layer import trainable_by_layer
from droppeft.client.client import base_delta_applied
from droppeft.config import AdapterConfig, Config, build_config, load_config, to_toml
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.layer_dropout import find_blocks, gated
from droppeft.messages.instruction import BaseDelta
from droppeft.models.architectures import ARCHITECTURES
from droppeft.models.loading import HEAD_MODULES, Backbone, load_backbone, load_dequantised
from droppeft.models.precision import autocast
from droppeft.models.quantization import is_quantised, on_device, quantised, quantization_of
from droppeft.training.activation_memory import ActivationMeter
from droppeft.training.checkpointing import checkpointed
from tiny import FAMILIES, save_tiny_model, tiny_model

BITS = ("8bit", "4bit")
NAMES = ("down", "up")
LAYERS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved tiny model of every family."""
    root = tmp_path_factory.mktemp("models")
    return {family: str(save_tiny_model(root / family, LAYERS, family)) for family in FAMILIES}


@pytest.fixture
def loaded(folders: dict[str, str], quantization: str) -> Any:
    """BERT, without dropout."""
    return without_dropout(load_backbone(folders["bert"], NAMES, 0, quantization).model)


def codes(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if is_quantised(value)}


def adapted(model: Any) -> tuple[Any, tuple[nn.Module, ...]]:
    """A model with LoRA in every layer, with random values; and its blocks."""
    wrapped = attach(
        model, adapter_spec(AdapterConfig.model_validate({}), LAYERS), find_blocks(model)[0], 7
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.1)
    return wrapped, find_blocks(wrapped)[1]


def gradients(model: Any) -> dict[str, Any]:
    model.zero_grad()
    loss(model.train()).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


# Loading


@pytest.mark.sample("*-bert", "4bit-gpt2")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", BITS)
def test_only_linear_maps_of_the_layers_are_quantised(
    family: str, quantization: str, folders: dict[str, str]
) -> None:
    whole, small = (load_backbone(folders[family], NAMES, 3, q) for q in ("none", quantization))
    path = whole.blocks_path
    inside = {
        f"{name}.weight"
        for name, module in whole.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(f"{path}.")
    }
    assert codes(small.model).keys() == inside
    assert quantization_of(small.model) == quantization
    per_byte = {"8bit": 1, "4bit": 2}[quantization]
    values = dict(small.model.named_parameters())
    for name, value in whole.model.named_parameters():
        if name in inside:
            assert values[name].numel() * per_byte == value.numel()
            assert values[name].element_size() == 1
        else:  # the values of heads follow from the seed
            assert torch.equal(values[name], value), name
    assert (small.new_modules, small.num_layers) == (whole.new_modules, LAYERS)


@pytest.mark.parametrize("quantization", BITS)
def test_an_architecture_is_quantised_as_its_saved_weights_are(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small = {**ARCHITECTURES["bert-large"], **sizes, "intermediate_size": 48}
    monkeypatch.setitem(ARCHITECTURES, "bert-large", small)
    whole, random = (
        load_backbone("config:bert-large", NAMES, 0, q) for q in ("none", quantization)
    )
    plain: Any = whole.model
    plain.save_pretrained(tmp_path)
    whole.tokenizer.save_pretrained(tmp_path)
    read = load_backbone(str(tmp_path), NAMES, 0, quantization)
    assert same(copies(random.model), copies(read.model))
    assert random.weights_hash == read.weights_hash
    assert len(codes(random.model)) == 12


def test_the_hash_depends_on_the_quantisation(folders: dict[str, str]) -> None:
    hashes = [
        load_backbone(folders["bert"], NAMES, seed, quantization).weights_hash
        for seed in (0, 1)
        for quantization in ("none", *BITS)
    ]
    assert hashes[:3] == hashes[3:]
    assert len(set(hashes)) == 3


def test_a_missing_bitsandbytes_is_reported_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DroppeftError) as caught:
        load_backbone("/nowhere", NAMES, 0, "4bit")
    assert str(caught.value) == (
        "quantization=4bit needs the package bitsandbytes; "
        "run: pip install 'droppeft[quantization]'"
    )
    with pytest.raises(DroppeftError, match="no such folder"):
        load_backbone("/nowhere", NAMES, 0)


@pytest.mark.parametrize("setting", ["none", "8bit"])
def test_files_that_are_quantised_already_are_refused(
    setting: str, folders: dict[str, str], tmp_path: Path
) -> None:
    backbone = load_backbone(folders["bert"], NAMES, 0, "4bit")
    model: Any = backbone.model
    model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DroppeftError, match="its files are quantised already; name the model that"):
        load_backbone(str(tmp_path), NAMES, 0, setting)


def test_the_setting_is_one_of_three_and_is_written_and_read() -> None:
    config = load_config(None, ["quantization=4bit"])
    assert build_config(config.model_dump(mode="json")) == config
    assert 'quantization = "4bit"' in to_toml(config)
    assert Config().quantization == "none"
    with pytest.raises(DroppeftError, match="quantization"):
        load_config(None, ["quantization=4"])


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("quantization", BITS)
def test_dequantised_weights_compute_what_the_quantised_ones_do(
    family: str, quantization: str, folders: dict[str, str]
) -> None:
    """In training mode: when it is evaluated on a CPU, an 8-bit layer rounds its inputs as well."""
    small: Backbone = load_backbone(folders[family], NAMES, 0, quantization)
    plain = load_dequantised(folders[family], NAMES, 0, quantization)
    whole = load_backbone(folders[family], NAMES, 0)
    batch = {name: texts()[name] for name in ("input_ids", "attention_mask")}
    found, expected, other = (
        without_dropout(one.model).train()(**batch).logits.detach() for one in (plain, small, whole)
    )
    assert (found - expected).abs().max() < 0.03 * (other - expected).abs().max()
    assert quantization_of(plain.model) == "none"
    assert [type(one) for one in plain.model.modules()] == [type(o) for o in whole.model.modules()]
    assert plain.weights_hash == small.weights_hash


# Frozen weights


@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_and_training_do_not_change_frozen_weights(loaded: Any, precision: str) -> None:
    """Without :func:`patch_quantised_layers`, on some CPUs a 4-bit layer cannot be trained after an
    evaluation, and an 8-bit layer's bias is rounded under autocast."""
    model, _ = adapted(loaded)
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    before = {name: value for name, value in copies(model).items() if name in frozen}
    for _ in range(2):
        logits(model)
        with autocast(precision, torch.device("cpu")):
            value = loss(model.train())
        value.backward()
    assert all(
        value.grad is not None and bool(value.grad.any())
        for value in model.parameters()
        if value.requires_grad
    )
    after = {name: value for name, value in copies(model).items() if name in frozen}
    assert same(before, after)
    assert {value.dtype for name, value in after.items() if name.endswith("bias")} == {
        torch.float32
    }


@pytest.mark.parametrize("quantization", ["4bit"])
def test_4_bits_are_those_of_qlora_and_not_packed_for_a_kernel_without_backward(
    loaded: Any,
) -> None:
    layers = [module for module in loaded.modules() if hasattr(module, "compute_dtype")]
    assert len(layers) == len(codes(loaded))
    for layer in layers:
        kind = layer.weight.quant_state
        assert (kind.quant_type, kind.nested, layer.compute_dtype) == ("nf4", True, torch.float32)
        assert not layer.support_avx512bf16_for_cpu


@pytest.mark.parametrize("used", [False, True])
def test_codes_and_scales_of_8_bit_layers_are_moved(folders: dict[str, str], used: bool) -> None:
    """torch moves a parameter's values, but not its attributes. Until the first forward, codes and
    scales are attributes of the weight; then they are in the layer's state."""
    one, other = (load_backbone(folders["bert"], NAMES, 0, "8bit").model for _ in range(2))
    expected = logits(one)
    if used:
        logits(other)
    for module in other.modules():
        if hasattr(module, "state"):
            holder = module.state if used else module.weight
            assert holder.CB is not None
            holder.CB = torch.zeros_like(holder.CB)
    assert torch.equal(logits(on_device(other, torch.device("cpu"))), expected)


@pytest.mark.parametrize("quantization", BITS)
def test_a_base_delta_on_a_quantised_weight_is_refused(loaded: Any, quantization: str) -> None:
    model, _ = adapted(loaded)
    weight = "bert.encoder.layer.1.attention.self.value.weight"
    norm = "bert.encoder.layer.1.output.LayerNorm.weight"
    shape = (32, 32) if quantization == "8bit" else (512, 1)
    before, plain = copies(model), logits(model)
    ones = {name: torch.ones(size).numpy() for name, size in ((weight, shape), (norm, (32,)))}
    with (
        pytest.raises(DroppeftError, match=f"base delta 3: {weight} is quantised and cannot be"),
        base_delta_applied(model, BaseDelta(3, ones)),
    ):
        pass
    assert same(copies(model), before)
    with base_delta_applied(model, BaseDelta(3, {norm: ones[norm]})):
        assert not torch.equal(logits(model), plain)
    assert same(copies(model), before)


# Layer dropout with quantised layers


@pytest.mark.parametrize("quantization", BITS)
def test_open_gates_are_the_plain_quantised_model(loaded: Any) -> None:
    model, blocks = adapted(loaded)
    plain, plain_gradients = logits(model), gradients(model)
    with gated(blocks) as gates:
        assert torch.equal(logits(model), plain)
        gated_gradients = gradients(model)
        assert gates.executed == (2,) * LAYERS
    for name, value in plain_gradients.items():
        assert torch.equal(value, gated_gradients[name]), name


class Nothing(nn.Module):
    """Replaces a block and returns its input."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize("quantization", BITS)
def test_a_dropped_block_is_like_an_absent_one(loaded: Any) -> None:
    model, blocks = adapted(loaded)
    with gated(blocks) as gates:
        gates.active = (True, False, True, False)
        found, its_gradients = logits(model), gradients(model)
        assert gates.executed == (2, 0, 2, 0)
    layers = model.get_submodule(find_blocks(model)[0])
    layers[1], layers[3] = Nothing(), Nothing()
    assert torch.equal(logits(model), found)
    expected = gradients(model)
    for name, value in its_gradients.items():
        if name in expected:
            assert torch.equal(value, expected[name]), name
        else:
            assert ".layer.1." in name or ".layer.3." in name
            assert value is None


def stored_bytes(
    model: Any, blocks: tuple[nn.Module, ...], active: tuple[bool, ...], precision: str = "fp32"
) -> int:
    meter = ActivationMeter(model)
    with gated(blocks) as gates:
        gates.active = active
        with autocast(precision, torch.device("cpu")), meter.measuring():
            loss(model.train())
    return meter.peak_bytes


def stored_on_functions(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tensors that autograd functions store as attributes, where no hook sees them."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [function for function, _ in node.next_functions]
            for attribute in getattr(node, "__dict__", {}).values():
                for item in attribute if isinstance(attribute, list | tuple) else (attribute,):
                    if isinstance(item, torch.Tensor):
                        yield item


@pytest.mark.parametrize("quantization", BITS)
def test_stored_bytes_are_as_in_full_precision_and_all_are_counted(
    loaded: Any, folders: dict[str, str]
) -> None:
    whole = without_dropout(load_backbone(folders["bert"], NAMES, 0).model)
    (small, its_blocks), (plain, blocks) = adapted(loaded), adapted(whole)
    code_storages = {value.untyped_storage().data_ptr() for value in codes(small).values()}
    counts = {}
    for dropped in range(3):
        active = tuple(layer >= LAYERS - 1 - dropped or layer == 0 for layer in range(LAYERS))
        counts[dropped] = stored_bytes(small, its_blocks, active)
        assert counts[dropped] == stored_bytes(plain, blocks, active)
    assert counts[2] > counts[1] > counts[0]
    hidden = list(stored_on_functions(loss(small.train())))
    assert {each.untyped_storage().data_ptr() for each in hidden} <= code_storages
    assert trainable_by_layer(small, find_blocks(small)[0]).keys() == {*range(LAYERS), "head"}


@pytest.mark.parametrize("quantization", BITS)
def test_in_bf16_the_copies_of_weights_are_saved_as_well(
    loaded: Any, folders: dict[str, str]
) -> None:
    """Autocast stores a copy of every weight for the backward, two bytes for each value."""
    whole = without_dropout(load_backbone(folders["bert"], NAMES, 0).model)
    pair = adapted(loaded), adapted(whole)
    every, without = (True,) * LAYERS, (True, False, True, True)
    small_block, block = (
        stored_bytes(*one, every, "bf16") - stored_bytes(*one, without, "bf16") for one in pair
    )
    assert block - small_block == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert 0 < small_block < stored_bytes(*pair[0], every) - stored_bytes(*pair[0], without)


@pytest.mark.parametrize("quantization", BITS)
def test_checkpointing_gives_the_same_gradients_and_stores_less(loaded: Any) -> None:
    model, blocks = adapted(loaded)
    expected, meters = gradients(model), (ActivationMeter(model), ActivationMeter(model))
    with meters[0].measuring():
        loss(model.train())
    with checkpointed(model, blocks, meters[1].note), gated(blocks) as gates:
        for name, value in gradients(model).items():
            assert torch.equal(value, expected[name]), name
        assert gates.executed == (1,) * LAYERS
        with meters[1].measuring():
            hidden = list(stored_on_functions(loss(model.train())))
    code_storages = {value.untyped_storage().data_ptr() for value in codes(model).values()}
    assert {each.untyped_storage().data_ptr() for each in hidden} <= code_storages
    assert meters[1].peak_bytes < 0.6 * meters[0].peak_bytes


def test_an_8_bit_layer_without_the_patch_stores_its_input() -> None:
    """If this fails, bitsandbytes has changed, and the patch may no longer be needed."""
    saved: Any = tiny_model(LAYERS)
    loaded = quantised(saved, "8bit", HEAD_MODULES)
    loaded.get_input_embeddings().requires_grad_(True)
    hidden = list(stored_on_functions(loss(loaded.train())))
    assert sum(each.numel() for each in hidden if each.is_floating_point()) > 0
