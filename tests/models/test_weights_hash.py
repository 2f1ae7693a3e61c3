"""The hash of a backbone's weights: it covers all of them, and is computed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from droppeft.models import weights_hash
from droppeft.models.loading import HEAD_MODULES, load_backbone
from droppeft.models.weights_hash import hash_weights
from tiny import save_tiny_model, tiny_model

NAMES = ("a", "b")


def test_it_depends_on_every_value_but_those_of_the_head() -> None:
    model: Any = tiny_model(1)
    before = hash_weights(model, HEAD_MODULES)
    assert hash_weights(tiny_model(1), HEAD_MODULES) == before
    for name, value in model.named_parameters():
        middle, whole = value.numel() // 2, value.detach().clone()
        with torch.no_grad():
            value.reshape(-1)[middle] += 1
        is_head = bool({*name.split(".")} & {*HEAD_MODULES})
        assert (hash_weights(model, HEAD_MODULES) == before) == is_head, name
        value.data = whole


def test_it_is_the_same_whatever_the_shards_and_the_classes(tmp_path: Path) -> None:
    whole = save_tiny_model(tmp_path / "whole", 2)
    model: Any = tiny_model(2, vocab_size=30522)
    first = load_backbone(str(whole), NAMES, 0)
    model.load_state_dict(load_file(whole / "model.safetensors"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    first.tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    second = load_backbone(str(tmp_path / "shards"), ("a", "b", "c"), 1)
    assert first.weights_hash == second.weights_hash


def test_files_that_did_not_change_are_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path / "cache"))
    folder, calls = save_tiny_model(tmp_path / "model", 1), []

    def counting(*given: Any) -> str:
        calls.append(1)
        return hash_weights(*given)

    monkeypatch.setattr(weights_hash, "hash_weights", counting)
    first, again = (load_backbone(str(folder), NAMES, 0).weights_hash for _ in range(2))
    assert first == again
    assert len(calls) == 1
    [entry] = (tmp_path / "cache" / "weights").iterdir()
    assert entry.stat().st_mode & 0o777 == 0o600
    entry.write_text("garbage")
    assert load_backbone(str(folder), NAMES, 0).weights_hash == first
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layer.0.attention.self.query.weight" in name)
    weights[name][16, 16] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load_backbone(str(folder), NAMES, 0).weights_hash != first
    assert len(calls) == 3
