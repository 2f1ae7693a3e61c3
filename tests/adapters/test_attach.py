import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from droppeft.adapters.attach import attach, detach, export_adapter
from droppeft.adapters.by_layer import trainable_by_layer
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks
from droppeft.messages.instruction import AdapterSpec, LayerAdapter
from droppeft.messages.tensors import HEAD
from tiny import FAMILIES, save_tiny_model, tiny_model

PATH = "bert.encoder.layer"
EXPORT = """
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from droppeft.adapters.attach import attach, export_adapter
from droppeft.messages.instruction import AdapterSpec, LayerAdapter

model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
layers = tuple(LayerAdapter("lora", rank) for rank in (2, 4, 8, 2))
spec = AdapterSpec(layers, alpha=16.0, targets=("all-linear",))
export_adapter(attach(model, spec, "bert.encoder.layer", 0), Path(sys.argv[2]), "card")
"""


def spec(*ranks: int | None, targets: tuple[str, ...] = ("default",)) -> AdapterSpec:
    layers = tuple(LayerAdapter("lora", rank) if rank else None for rank in ranks)
    return AdapterSpec(layers, alpha=16.0, targets=targets)


def adapted(model: nn.Module, ending: str = "lora_A.default.weight") -> dict[str, nn.Parameter]:
    """Adapter matrices by the name of the module that they are attached to."""
    return {
        name.removeprefix("base_model.model.").removesuffix(f".{ending}"): value
        for name, value in model.named_parameters()
        if name.endswith(ending)
    }


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether names, their order and bits are equal."""
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(1, 13).reshape(2, 6)}


def scramble(model: nn.Module) -> None:
    """Set trained tensors to random values, since a new adapter has no effect."""
    torch.manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.normal_(std=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_the_head_are_trainable(family: str) -> None:
    backbone = tiny_model(4, family)
    path, _ = find_blocks(backbone)
    head = {name for name, _ in backbone.named_parameters() if name.startswith(("class", "score"))}
    model = attach(backbone, spec(2, None, 8, 4), path, 0)
    groups = trainable_by_layer(model, find_blocks(model)[0])
    assert list(groups) == [0, 2, 3, HEAD]
    for layer, rank in ((0, 2), (2, 8), (3, 4)):
        assert all(".lora_" in name for name in groups[layer])
        inner = {value.shape[0] for name, value in groups[layer].items() if ".lora_A." in name}
        assert inner == {rank}
    names = {name.replace(".modules_to_save.default", "") for name in groups[HEAD]}
    assert {name.removeprefix("base_model.model.") for name in names} == head
    assert head


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_means_every_linear_module_of_the_layers_and_no_other(family: str) -> None:
    backbone = tiny_model(6, family)
    path, _ = find_blocks(backbone)
    inside = {
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(f"{path}.")
    }
    model = attach(backbone, spec(*[2] * 6, targets=("all-linear",)), path, 0)
    assert adapted(model).keys() == inside


def test_named_targets_in_many_layers_keep_their_ranks() -> None:
    """Layer 1 must not be taken for layer 10 or 11."""
    ranks = tuple(range(1, 13))
    model = attach(tiny_model(12), spec(*ranks, targets=("query", "dense")), PATH, 0)
    found = {name: value.shape[0] for name, value in adapted(model).items()}
    modules = ("attention.self.query", "attention.output.dense", "intermediate.dense")
    assert found == {
        f"{PATH}.{layer}.{module}": ranks[layer]
        for layer in range(12)
        for module in (*modules, "output.dense")
    }


def test_scaling_is_alpha_over_the_rank_of_the_layer() -> None:
    model = attach(tiny_model(2), spec(2, 8), PATH, 0)
    scalings = {
        name: module.scaling["default"]
        for name, module in model.named_modules()
        if hasattr(module, "scaling") and name.endswith("query")
    }
    assert list(scalings.values()) == [16 / 2, 16 / 8]


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DroppeftError) as caught:
        attach(tiny_model(), spec(2, 2, 2, 2, targets=("query", "q_proj")), PATH, 0)
    assert str(caught.value) == (
        "adapter.targets: no layer has a linear module 'q_proj'; "
        "choose from dense, key, query, value"
    )


def test_an_architecture_without_default_targets_asks_for_names() -> None:
    backbone = tiny_model()
    backbone.config.model_type = "unheard-of"
    with pytest.raises(
        DroppeftError, match="no default targets for 'unheard-of'; name the modules"
    ):
        attach(backbone, spec(2, 2, 2, 2), PATH, 0)


def test_a_fresh_adapter_changes_nothing() -> None:
    backbone = tiny_model().eval()
    with torch.no_grad():
        plain = backbone(**ids()).logits
        model = attach(backbone, spec(2, 2, 2, 2), PATH, 0).eval()
        assert torch.equal(model(**ids()).logits, plain)


def test_the_seed_alone_decides_the_values() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = attach(tiny_model(), spec(2, 2, 2, 2), PATH, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = attach(tiny_model(), spec(2, 2, 2, 2), PATH, 7)
    other = attach(tiny_model(), spec(2, 2, 2, 2), PATH, 8)
    assert same(copies(first), copies(again))
    assert not any(
        torch.equal(value, adapted(other)[name]) for name, value in adapted(first).items()
    )


def test_detach_gives_the_backbone_back() -> None:
    backbone = tiny_model().eval()
    before = copies(backbone)
    with torch.no_grad():
        plain = backbone(**ids()).logits
        model = attach(backbone, spec(2, None, 8, 2), PATH, 0)
        scramble(model)
        assert not torch.equal(model.eval()(**ids()).logits, plain)
        restored = detach(model)
        assert restored is backbone
        assert same(copies(restored), before)
        assert torch.equal(restored.eval()(**ids()).logits, plain)


def test_another_adapter_can_follow() -> None:
    model = attach(tiny_model(), spec(2, 2, 2, None), PATH, 0)
    scramble(model)
    second = attach(detach(model), spec(None, 4, 8, 4, targets=("key",)), PATH, 3)
    fresh = attach(tiny_model(), spec(None, 4, 8, 4, targets=("key",)), PATH, 3)
    assert same(copies(second), copies(fresh))
    trainable = [name for name, value in second.named_parameters() if value.requires_grad]
    assert trainable == [name for name, value in fresh.named_parameters() if value.requires_grad]


def test_plain_peft_loads_an_export_and_computes_the_same(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    load: Any = AutoModelForSequenceClassification.from_pretrained
    model = attach(load(base), spec(2, None, 8, 4, targets=("all-linear",)), PATH, 0).eval()
    scramble(model)
    export_adapter(model, tmp_path / "adapter", "# A card\n")
    other = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = model(**ids()).logits
        assert torch.equal(other(**ids()).logits, logits)
        assert not torch.equal(load(base).eval()(**ids()).logits, logits)
    assert (tmp_path / "adapter" / "README.md").read_text() == "# A card\n"


@pytest.mark.full
def test_an_export_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EXPORT, str(base), str(tmp_path / f"out{hash_seed}")],
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        )
        for hash_seed in (1, 2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / f"out{seed}").iterdir()}
        for seed in (1, 2)
    )
    assert first == second
    assert first.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads(first["adapter_config.json"])
    assert len(config["target_modules"]) > 3  # otherwise there is no order


def test_a_new_pooler_is_trained_and_exported_with_the_head(tmp_path: Path) -> None:
    model = attach(tiny_model(2), spec(2, 2), PATH, 0, ("classifier", "pooler"))
    head = trainable_by_layer(model, f"base_model.model.{PATH}")[HEAD]
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in head} == {
        "classifier",
        "pooler",
    }
    export_adapter(model, tmp_path, "card")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "pooler" in config["modules_to_save"]


def test_a_specification_without_an_adapter_is_refused() -> None:
    with pytest.raises(DroppeftError, match="no layer has an adapter"):
        attach(tiny_model(2), spec(None, None), PATH, 0)
