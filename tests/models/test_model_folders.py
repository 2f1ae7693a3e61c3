"""Folders that hold no usable model are refused in a sentence that says what to do."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from droppeft.models import sources
from droppeft.models.causal_lm import load_causal_lm
from droppeft.models.loading import load_backbone, load_backbone_config
from droppeft.models.sources import find_source
from refusals import refused
from tiny import save_tiny_model

WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", 2)


def configure(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def only_configuration(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def only_weights(folder: Path) -> None:
    (folder / "config.json").unlink()


def a_run(folder: Path) -> None:
    only_weights(folder)
    (folder / "config.toml").touch()


def checkpoints(folder: Path) -> None:
    only_weights(folder)
    save_tiny_model(folder / "checkpoint-9", 1)


def no_type(folder: Path) -> None:
    configure(folder, model_type=None)


def of_its_own_code(folder: Path) -> None:
    configure(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})


def no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def impossible(folder: Path) -> None:
    configure(folder, num_attention_heads=0)


def fewer_layers(folder: Path) -> None:
    configure(folder, num_hidden_layers=1)


def cut_off(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def a_missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": WEIGHTS, "b": "model-2.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["bert.embeddings.word_embeddings.weight"][-1, 3] = float("nan")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def pointer_to_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER)


def damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def padding_without_embedding(folder: Path) -> None:
    tokenizer = find_source(str(folder)).load_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (only_configuration, "has no weights .*; download them"),
        (only_weights, "has no config.json; name a folder that"),
        (a_run, "it is a run; write its model with: droppeft export .* --merge"),
        (checkpoints, "has no config.json; models are in .*checkpoint-9$"),
        (no_type, "its config.json has no model_type"),
        (of_its_own_code, "needs code that comes with it .* never run here"),
        (no_object, r"config.json cannot be read \(it is no JSON object\)"),
        (impossible, "cannot be loaded from this folder: ZeroDivisionError"),
        (fewer_layers, r"more than the 1 layers .* \(such as bert.encoder.layer.1"),
        (cut_off, "model.safetensors is damaged or cut off .*; download it again"),
        (a_missing_shard, "index.json names model-2.safetensors, which is missing"),
        (not_a_number, "weight bert.embeddings.word_embeddings.weight has values that are inf"),
        (pointer_to_tokenizer, "tokenizer.json: is a Git LFS pointer .* git lfs pull"),
        (damaged_tokenizer, "its tokenizer cannot be loaded from this folder"),
        (padding_without_embedding, "pads with '<new>', token 30522, but .* 30522 tokens only"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(folder)
    with refused(sentence):
        load_backbone(str(folder), ("a", "b"), 0)


@pytest.mark.parametrize("further", [" model=base/model start_from=", ""])
def test_an_adapter_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: str
) -> None:
    """On the Hub, transformers would load the adapter's base model without a word."""
    path = tmp_path / ("adapter_config.json" if further else "bottleneck_config.json")
    path.write_text('{"base_model_name_or_path": "base/model"}')
    monkeypatch.setattr(sources, "find_adapter_config_file", lambda name: str(path))
    for name in (str(tmp_path), f"someone/adapter{len(further)}"):
        with refused("is an adapter") as found:
            load_backbone(name, ("a", "b"), 0)
        assert ("start_from" in str(found.value)) == bool(further)
        assert further in str(found.value)


class Writes:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("save", [torch.save, lambda it, to: to.write_bytes(pickle.dumps(it, 2))])
def test_a_pickle_runs_no_code(folder: Path, tmp_path: Path, save: Callable[..., object]) -> None:
    save({**load_file(folder / WEIGHTS), "x": Writes(tmp_path / "written")}, folder / PICKLE)
    (folder / WEIGHTS).unlink()
    with refused("might run code and is not read"):
        load_backbone(str(folder), ("a", "b"), 0)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_pickle_of_tensors_in_any_precision_is_loaded_in_fp32(
    folder: Path, dtype: torch.dtype
) -> None:
    before = {name: value.to(dtype) for name, value in load_file(folder / WEIGHTS).items()}
    torch.save(before, folder / PICKLE)
    (folder / WEIGHTS).unlink()
    loaded = load_backbone(str(folder), ("a", "b"), 0)
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name].float())


def test_tied_weights_may_be_left_out_and_others_may_not(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", 1, "llama")
    model: Any = load_causal_lm(str(_as_causal(folder, tied=True))).model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with refused("no fitting weights for lm_head.weight"):
        load_causal_lm(str(_as_causal(folder, tied=False)))


def _as_causal(folder: Path, *, tied: bool) -> Path:
    configure(folder, tie_word_embeddings=tied)
    return folder


def test_an_estimate_needs_no_weights_and_no_padding_token(folder: Path) -> None:
    only_configuration(folder)
    configure(folder, pad_token_id=None)
    assert load_backbone_config(str(folder), ("a", "b")).config.pad_token_id == 0
