"""Whole runs on weights in 8 and 4 bits: repeated, resumed, exported, merged, refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from droppeft.adapters.by_layer import set_tensors
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.models.quantization import is_quantised, quantization_of
from droppeft.runs.export import export_run
from droppeft.server.prepare import prepare
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from runs import Recorder, delivered_model, outcome, rows_of

TEXTS = ["bread apple cheese soup", "planet star", "violin song drum"]


def overrides_with(tiny_overrides: list[str], quantization: str) -> list[str]:
    without_dropout = [
        override for override in tiny_overrides if not override.startswith("dropout.")
    ]
    return [
        *without_dropout,
        "model=builtin",
        "dropout.count=2",
        "rounds=2",
        f"quantization={quantization}",
        "training.learning_rate=0.01",
    ]


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def finished(
    request: pytest.FixtureRequest,
    tiny_overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """A run of the built-in model, in which every step drops two layers."""
    out = tmp_path_factory.mktemp("bits") / request.param
    start_run(load_config(None, overrides_with(tiny_overrides, request.param)), out, Recorder())
    return request.param, out


def run_lines(lines: str) -> dict[str, Any]:
    loaded: dict[str, Any] = {}
    exec(lines, loaded)
    return loaded


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """In one batch: an 8-bit layer treats columns as outliers that have one anywhere in it."""
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(**batch).logits
    return found


def as_left_by(out: Path) -> tuple[Any, Any]:
    """The model of the last round, with the adapter attached as in the run itself."""
    prepared = prepare(load_config(out / "config.toml"), lambda step: None)
    client_model, model = prepared.model, delivered_model(out)
    client_model.attach(model.adapter)
    set_tensors(client_model.parameters, model.tensors)
    return client_model.model, prepared.loaded.backbone.tokenizer


@pytest.mark.sample("4bit")
def test_a_run_learns_and_the_same_seed_leaves_the_same_bytes(
    finished: tuple[str, Path], tmp_path: Path
) -> None:
    _, out = finished
    result = json.loads((out / "result.json").read_text())
    assert result["global_accuracy"] > 0.5
    assert all(row["failures"] == [] for row in rows_of(out / "rounds.jsonl"))
    again = tmp_path / "run"
    start_run(load_config(out / "config.toml"), again, Recorder())
    assert outcome(again) == outcome(out)


@pytest.mark.sample("4bit")
def test_a_resumed_run_leaves_the_same_bytes(finished: tuple[str, Path], tmp_path: Path) -> None:
    _, out = finished
    again = tmp_path / "run"
    shutil.copytree(out, again)
    sorted((again / "checkpoints").iterdir())[-1].unlink()
    (again / "result.json").unlink()
    shutil.rmtree(again / "adapter")
    resume_run(again, Recorder())
    assert outcome(again) == outcome(out)


@pytest.mark.sample("4bit")
def test_a_run_keeps_its_bits(finished: tuple[str, Path], tmp_path: Path) -> None:
    _, out = finished
    other = tmp_path / "run"
    shutil.copytree(out, other)
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(re.sub('quantization = ".*"', 'quantization = "none"', text))
    with pytest.raises(DroppeftError, match=r'other settings .*: quantization="none" \(was '):
        export_run(other, tmp_path / "adapter")
    (other / "result.json").unlink()
    with pytest.raises(DroppeftError, match=r'other settings .*: quantization="none" \(was '):
        resume_run(other, Recorder())


@pytest.mark.sample("4bit")
def test_the_card_loads_the_same_bits_and_the_same_adapter(
    finished: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs may differ: on some CPUs the run uses a 4-bit kernel that computes in bfloat16."""
    quantization, out = finished
    card = (out / "adapter" / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    monkeypatch.chdir(out / "adapter")
    loaded = run_lines(
        found.group(1).partition("print(")[0]
    )  # a kernel rewrites codes when it runs
    expected, tokenizer = as_left_by(out)
    codes = {
        name: value.clone()
        for name, value in loaded["model"].named_parameters()
        if is_quantised(value)
    }
    assert len(codes) == 6 * 6
    for name, value in expected.named_parameters():
        if is_quantised(value):
            assert torch.equal(codes[name], value), name
    theirs, ours = (
        logits(loaded["model"], loaded["classify"].tokenizer),
        logits(expected, tokenizer),
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.03 * float(ours.abs().max()))
    assert f"with its linear maps in {quantization[0]} bits (bitsandbytes) |" in card


@pytest.mark.sample("4bit")
def test_a_merged_model_has_the_dequantized_weights(
    finished: tuple[str, Path], tmp_path: Path
) -> None:
    quantization, out = finished
    exported = export_run(out, tmp_path / "merged", merge=True)
    loaded = run_lines(exported.lines)
    model = loaded["classify"].model
    assert quantization_of(model) == "none"
    assert not hasattr(model.config, "quantization_config")
    expected, tokenizer = as_left_by(out)
    theirs, ours = logits(model, loaded["classify"].tokenizer), logits(expected, tokenizer)
    near = {"8bit": 0.05, "4bit": 1e-4}[quantization]  # 8-bit layers round their inputs, too
    torch.testing.assert_close(theirs, ours, rtol=0, atol=near * float(ours.abs().max()))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"on a base with its linear maps in {quantization[0]} bits (bitsandbytes)." in card
    assert "the accuracy was recorded with the\nquantised ones" in card
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")


def test_the_card_of_a_run_without_quantization_does_not_mention_bits(whole_run: Path) -> None:
    card = (whole_run / "adapter" / "README.md").read_text()
    assert "bits" not in card
    assert "quantization" not in card


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("quantization=4bit", "adapter.type=loha"),
            "adapter.type=loha does not work with 4-bit weights: it treats the quantised codes as "
            "if they were weights; set quantization=none, or choose bottleneck, lora, ",
        ),
        (
            ("quantization=8bit", "adapter.type=c3a"),
            "adapter.type=c3a does not work with 8-bit weights: it changes a layer's output in ",
        ),
        (
            ("quantization=8bit", "adapter.options.use_dora=true"),
            "adapter.options.use_dora: peft loses the scales of 8-bit weights",
        ),
    ],
)
def test_what_does_not_work_is_refused_before_anything_is_read_or_written(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    listener = Recorder()
    config = load_config(None, ["data=/nowhere", "model=/nowhere", *overrides])
    with pytest.raises(DroppeftError, match=f"^{re.escape(message)}"):
        start_run(config, tmp_path / "run", listener)
    assert listener.steps == []
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_reported_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    listener = Recorder()
    message = r"^quantization=8bit needs the package bitsandbytes; run: "
    with pytest.raises(DroppeftError, match=message):
        start_run(load_config(None, ["quantization=8bit"]), tmp_path / "run", listener)
    assert listener.steps == []
