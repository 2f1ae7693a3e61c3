"""Runs of the task ``causal_lm`` on weights in 8 and 4 bits: learnt, repeated, exported, merged."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chats import LAYERS, chat_settings
from droppeft.adapters.by_layer import set_tensors
from droppeft.config import load_config
from droppeft.models.quantization import is_quantised, quantization_of
from droppeft.runs.export import export_run
from droppeft.server.prepare import prepare
from droppeft.server.run import start_run
from runs import Recorder, adapter_bytes, delivered_model, outcome, rows_of

SETTINGS = (
    *("rounds=2", "clients=2", "cohort_size=2", "evaluation.personalised=false"),
    *("training.local_steps=12", "training.learning_rate=0.01", "adapter.targets=all-linear"),
)


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def quantization(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def settings(quantization: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    chat = chat_settings(tmp_path_factory.mktemp("chat"))
    return [*chat, *SETTINGS, f"quantization={quantization}", "training.precision=fp32"]


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny Llama in which every step drops a layer; tests only read it."""
    out = tmp_path_factory.mktemp("bits") / "run"
    start_run(load_config(None, settings), out, Recorder())
    return out


def as_left_by(out: Path) -> Any:
    """The model of the delivered round, with the adapter attached as in the run itself."""
    client_model = prepare(load_config(out / "config.toml"), lambda step: None).model
    model = delivered_model(out)
    client_model.attach(model.adapter)
    set_tensors(client_model.parameters, model.tensors)
    return client_model.model


def logits(model: Any) -> torch.Tensor:
    """In one batch: an 8-bit layer treats columns as outliers that have one anywhere in it."""
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(2, 26).reshape(2, 12)).logits
    return found


def run_lines(lines: str) -> dict[str, Any]:
    loaded: dict[str, Any] = {}
    exec(lines, loaded)
    return loaded


@pytest.mark.sample("4bit")
def test_training_lowers_the_loss(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["global_loss"] < 0.85 * result["initial_loss"]
    assert all(row["failures"] == [] for row in rows_of(finished / "rounds.jsonl"))


@pytest.mark.sample("4bit")
def test_the_same_seed_leaves_the_same_bytes_and_another_does_not(
    settings: list[str], finished: Path, tmp_path: Path
) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        start_run(load_config(None, [*settings, f"seed={seed}"]), tmp_path / name, Recorder())
    assert outcome(tmp_path / "again") == outcome(finished)
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(finished)


@pytest.mark.full
def test_checkpointing_leaves_the_same_adapter(
    settings: list[str], finished: Path, tmp_path: Path
) -> None:
    config = load_config(None, [*settings, "training.checkpointing=true"])
    start_run(config, tmp_path / "run", Recorder())
    found, expected = (adapter_bytes(out) for out in (tmp_path / "run", finished))
    weights = "adapter_model.safetensors"
    assert found[weights] == expected[weights]


@pytest.mark.sample("4bit")
def test_the_card_loads_the_same_bits_and_the_same_adapter(
    quantization: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On CPUs with AVX512-BF16, bitsandbytes packs weights for a kernel that refuses a model this
    # small.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    card = (finished / "adapter" / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    monkeypatch.chdir(finished / "adapter")
    loaded, expected = run_lines(found.group(1))["model"], as_left_by(finished)
    assert quantization_of(loaded) == quantization_of(expected) == quantization
    bits = [dict(one.named_parameters()) for one in (loaded, expected)]
    codes = [name for name, value in bits[1].items() if is_quantised(value)]
    assert len(codes) == 7 * LAYERS
    assert all(torch.equal(bits[0][name], bits[1][name]) for name in codes)
    ours = logits(expected)
    torch.testing.assert_close(logits(loaded), ours, rtol=0, atol=0.03 * float(ours.abs().max()))


@pytest.mark.sample("4bit")
def test_a_merged_model_has_the_dequantised_weights(
    quantization: str, finished: Path, tmp_path: Path
) -> None:
    export_run(finished, tmp_path / "merged", merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits(as_left_by(finished))
    assert quantization_of(loaded) == "none"
    near = {"8bit": 0.05, "4bit": 1e-4}[quantization]  # 8-bit layers round their inputs, too
    atol = near * float(expected.abs().max())
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=atol)
