"""Bottleneck adapters: their output, their places and their file format."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

import adapter_contract as contract
from adapter_contract import LAYERS, Attached, Case
from droppeft.adapters.attach import attach, detach, export_adapter, loading_of, merged
from droppeft.adapters.bottleneck import CONFIG, PLACES, TENSORS, Bottleneck, load_bottleneck
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks
from droppeft.messages.instruction import AdapterSpec, LayerAdapter
from tiny import FAMILIES, tiny_model

CASE = contract.case("bottleneck", "bert")
# Biases to which adding a constant equals adding it to the adapter; llama has no biases.
BIASES = {
    "bert": ("attention.output.dense.bias", "output.dense.bias"),
    "roberta": ("attention.output.dense.bias", "output.dense.bias"),
    "deberta-v2": ("attention.output.dense.bias", "output.dense.bias"),
    "gpt2": ("attn.c_proj.bias", "mlp.c_proj.bias"),
}


def spec(*widths: int | None, targets: tuple[str, ...] = ("default",)) -> AdapterSpec:
    layers = (
        None if width is None else LayerAdapter("bottleneck", width=width) for width in widths
    )
    return AdapterSpec(tuple(layers), targets=targets)


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    return {name: found for name, found in model.named_modules() if isinstance(found, Bottleneck)}


def test_the_output_is_that_of_houlsby_et_al() -> None:
    adapter = Bottleneck(4, 2)
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(adapter(hidden), hidden)
    nn.init.normal_(adapter.up.weight)
    nn.init.normal_(adapter.up.bias)
    down, up = adapter.down, adapter.up
    inner = functional.gelu(hidden @ down.weight.T + down.bias)
    torch.testing.assert_close(adapter(hidden), hidden + inner @ up.weight.T + up.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing(family: str) -> None:
    attached = Attached(contract.case("bottleneck", family))
    assert torch.equal(contract.logits(attached.model), contract.logits(contract.backbone(family)))


@pytest.mark.parametrize("place", [0, 1], ids=["attention", "feed_forward"])
@pytest.mark.parametrize("family", BIASES)
def test_it_is_before_the_residual_connection(family: str, place: int) -> None:
    """Adding a constant there equals adding it to the bias of the sublayer."""
    shift = torch.linspace(-1.0, 1.0, 32)
    attached = Attached(contract.case("bottleneck", family))
    plain = contract.backbone(family)
    name = f"bottleneck_{tuple(PLACES[family])[place]}"
    with torch.no_grad():
        attached.blocks[1].get_submodule(name).get_parameter("up.bias").copy_(shift)
        find_blocks(plain)[1][1].get_parameter(BIASES[family][place]).add_(shift)
    torch.testing.assert_close(contract.logits(attached.model), contract.logits(plain))
    assert not torch.allclose(contract.logits(plain), contract.logits(contract.backbone(family)))


@pytest.mark.parametrize(
    ("place", "sublayer"),
    [
        ("attention", "self_attn"),
        ("feed_forward", "mlp"),
    ],
)
def test_it_is_before_the_residual_connection_of_a_llama(place: str, sublayer: str) -> None:
    """The constant is part of the output of the sublayer, to which the block adds its input."""
    outputs = []
    for shift in (0.0, 0.25):
        attached = Attached(contract.case("bottleneck", "llama"))
        block = attached.blocks[0]
        block.get_submodule(f"bottleneck_{place}").get_parameter("up.bias").data.add_(shift)
        block.get_submodule(sublayer).register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        contract.logits(attached.model)
    torch.testing.assert_close(outputs[1], outputs[0] + 0.25)


def test_supported_architectures() -> None:
    assert PLACES.keys() == {*FAMILIES, "xlm-roberta"}


def test_it_works_on_xlm_roberta() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("xlm-roberta", vocab_size=64, intermediate_size=64, **sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    attached = attach(model, spec(4, 4), find_blocks(model)[0], 0)
    assert len(bottlenecks(attached)) == 4
    contract.forward(attached).logits.sum().backward()
    assert all(found.up.bias.grad is not None for found in bottlenecks(attached).values())


def test_widths_and_places_may_differ_by_layer() -> None:
    attached = Attached(CASE, spec(4, None, 8, targets=("feed_forward",)))
    found = {
        name: adapter.down.out_features for name, adapter in bottlenecks(attached.model).items()
    }
    path = "bert.encoder.layer"
    assert found == {
        f"{path}.0.bottleneck_feed_forward": 4,
        f"{path}.2.bottleneck_feed_forward": 8,
    }


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (
            "bert",
            ("query",),
            "adapter.targets: a bottleneck has no place 'query'; it has attention, feed_forward",
        ),
        (
            "unheard-of",
            ("default",),
            "bottlenecks are not supported for 'unheard-of', only for ",
        ),
    ],
)
def test_an_unknown_place_is_refused(family: str, targets: tuple[str, ...], message: str) -> None:
    base = tiny_model(2)
    base.config.model_type = family
    with pytest.raises(DroppeftError, match=f"^{re.escape(message)}"):
        attach(base, spec(4, 4, targets=targets), "bert.encoder.layer", 0)


def test_detaching_leaves_no_hook() -> None:
    base = detach(Attached(CASE).model)
    assert not any(module._forward_hooks for module in base.modules())


# The file format


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    attached = Attached(CASE, spec(4, None, 8, targets=("attention",)))
    attached.scramble()
    export_adapter(attached.model, tmp_path / "adapter", "# A card\n")
    return tmp_path / "adapter", contract.logits(attached.model)


def test_a_plain_model_loads_it(exported: tuple[Path, torch.Tensor]) -> None:
    folder, expected = exported
    loaded = load_bottleneck(contract.backbone("bert"), folder)
    assert torch.equal(contract.logits(loaded), expected)


def test_files_of_an_export(exported: tuple[Path, torch.Tensor]) -> None:
    folder, _ = exported
    assert {path.name for path in folder.iterdir()} == {"README.md", CONFIG, TENSORS}
    assert (folder / "README.md").read_text() == "# A card\n"
    assert json.loads((folder / CONFIG).read_text()) == {
        "base_model": "",
        "format": "droppeft bottleneck 1",
        "model_type": "bert",
        "places": ["attention"],
        "widths": [4, None, 8],
    }
    parts = ("down.bias", "down.weight", "up.bias", "up.weight")
    assert set(load_file(folder / TENSORS)) == {
        "classifier.bias",
        "classifier.weight",
        *(f"bert.encoder.layer.{i}.bottleneck_attention.{part}" for i in (0, 2) for part in parts),
    }


def test_peft_refuses_to_load_it(exported: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(contract.backbone("bert"), exported[0])


def test_a_backbone_in_bfloat16_keeps_its_type(exported: tuple[Path, torch.Tensor]) -> None:
    model = load_bottleneck(contract.backbone("bert").to(torch.bfloat16), exported[0])
    logits = contract.logits(model)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exported[1], atol=0.2, rtol=0.1)


def damage(folder: Path, damaged: str) -> None:
    config, tensors = folder / CONFIG, load_file(folder / TENSORS)
    if damaged == "missing":
        config.unlink()
    elif damaged == "cut":
        (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])
    elif damaged == "no JSON":
        config.write_text("{")
    elif damaged == "another format":
        config.write_text(config.read_text().replace("bottleneck 1", "bottleneck 2"))
    elif damaged == "fewer tensors":
        tensors.pop("bert.encoder.layer.0.bottleneck_attention.up.bias")
        save_file(tensors, folder / TENSORS)
    elif damaged == "more tensors":
        save_file({**tensors, "bert.extra": torch.zeros(1)}, folder / TENSORS)
    elif damaged == "another shape":
        save_file({**tensors, "classifier.bias": torch.zeros(5)}, folder / TENSORS)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("missing", "has no readable bottleneck adapter"),
        ("cut", "has no readable bottleneck adapter"),
        ("no JSON", "is not a configuration that droppeft wrote"),
        ("another format", "has format 'droppeft bottleneck 2', not 'droppeft bottleneck 1'"),
        ("fewer tensors", "has the tensor bert.encoder.layer.0.bottleneck_attention.up.bias"),
        ("more tensors", "does not fit this model: only one of them has the tensor bert.extra"),
        ("another shape", "does not fit this model: size mismatch for classifier.bias"),
    ],
)
def test_a_damaged_folder_is_refused(
    exported: tuple[Path, torch.Tensor], damaged: str, message: str
) -> None:
    folder, _ = exported
    damage(folder, damaged)
    model = contract.backbone("bert")
    with pytest.raises(DroppeftError, match=re.escape(message)) as caught:
        load_bottleneck(model, folder)
    assert str(folder) in str(caught.value)
    assert bottlenecks(model) == {}


def test_a_model_that_does_not_fit_is_refused(exported: tuple[Path, torch.Tensor]) -> None:
    folder, _ = exported
    with pytest.raises(DroppeftError, match="is for a bert of 3 layers, not for a roberta of 3"):
        load_bottleneck(contract.backbone("roberta"), folder)
    with pytest.raises(DroppeftError, match=f"of {LAYERS} layers, not for a bert of 2 layers"):
        load_bottleneck(tiny_model(2), folder)
    model = load_bottleneck(contract.backbone("bert"), folder)
    with pytest.raises(DroppeftError, match="already has bottlenecks; load the model again"):
        load_bottleneck(model, folder)


def test_types_that_cannot_be_merged_are_refused() -> None:
    with pytest.raises(DroppeftError, match="type bottleneck cannot be merged into the backbone"):
        merged(Attached(CASE).model)
    with pytest.raises(DroppeftError, match="type prefix_tuning cannot be merged"):
        merged(Attached(contract.case("prefix_tuning", "bert")).model)


def test_loading_names_existing_functions() -> None:
    for name in ("bottleneck", "lora"):
        names: dict[str, Any] = {}
        exec(loading_of(name).import_line, names)
        assert callable(eval(loading_of(name).function, names))


def test_the_order_of_places_does_not_matter() -> None:
    one, other = (
        Attached(Case("bottleneck", "bert", {"width": 4, "targets": targets})).model
        for targets in (("attention", "feed_forward"), ("feed_forward", "attention"))
    )
    assert contract.same(contract.copies(one), contract.copies(other))
