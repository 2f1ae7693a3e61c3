"""The examples run as they stand, and the README's lines are settings that exist."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from droppeft.cli import _split
from droppeft.config import load_config
from droppeft.federation.run import start_run
from droppeft.layer_dropout import find_blocks, gated, layer_rates, sample_active
from runs import Recorder
from tiny import tiny_model

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.is_file())


def test_every_example_has_a_test() -> None:
    """`flower_on_loopback.py` runs in federation/flower/test_three_places.py."""
    assert EXAMPLES == ["ag_news.toml", "flower_on_loopback.py", "layer_dropout_alone.py"]


def test_layer_dropout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    program = runpy.run_path(str(ROOT / "examples/layer_dropout_alone.py"))
    program["main"].__globals__["STEPS"] = 3
    program["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("layers 3 of 6") for line in lines)


def test_ag_news(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to what a test can run: fewer rounds, devices, steps and texts."""
    monkeypatch.setenv("DROPPEFT_DATA", str(data_folder))
    words = ["rounds=1", "devices=4", "cohort=2", "training.local_steps=2", "training.batch_size=4"]
    few = ["source.max_train_rows=400", "source.max_test_rows=40", "training.max_length=32"]
    config = load_config(ROOT / "examples/ag_news.toml", [*words, *few])
    result = start_run(config, tmp_path / "run", Recorder())
    assert result["mean_active_layers"] == 4.0
    assert (result["classes"], result["test_rows"]) == (4, 40)


def readme_commands() -> list[str]:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    found = [line.partition("  #")[0].strip() for line in lines]
    return [line for line in found if line.startswith("droppeft run")]


def test_the_readme_has_commands() -> None:
    assert len(readme_commands()) > 10


@pytest.mark.parametrize("command", readme_commands())
def test_a_readme_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path, words = _split(shlex.split(command)[2:])
    load_config(path if path and path.exists() else None, words)


def test_the_readme_s_loop_runs() -> None:
    [code] = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "gated(blocks)" in block
    ]
    import torch

    model = tiny_model(4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batches = [{"input_ids": ids, "labels": torch.tensor([0, 1])}] * 3
    names = {"model": model, "optimizer": optimizer, "batches": batches}
    exec(code, names)
    assert names["find_blocks"] is find_blocks
    assert (names["gated"], names["layer_rates"], names["sample_active"]) == (
        gated,
        layer_rates,
        sample_active,
    )
    assert all("forward" not in vars(block) for block in find_blocks(model)[1])
