"""The examples run, and the code and commands in the README are valid."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from droppeft.cli import _split
from droppeft.config import load_config
from droppeft.layer_dropout import find_blocks
from droppeft.methods.rules import check_settings
from droppeft.server.run import start_run
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
    """With fewer rounds, clients, steps and texts."""
    monkeypatch.setenv("DROPPEFT_DATA", str(data_folder))
    overrides = [
        "rounds=1",
        "clients=4",
        "cohort_size=2",
        "training.local_steps=2",
        "training.batch_size=4",
    ]
    limits = ["source.max_train_rows=400", "source.max_test_rows=40", "training.max_length=32"]
    config = load_config(ROOT / "examples/ag_news.toml", [*overrides, *limits])
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
def test_a_readme_command_is_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path, overrides = _split(shlex.split(command)[2:])
    check_settings(load_config(path if path and path.exists() else None, overrides))


def readme_code(part: str) -> str:
    """Return the only Python block in the README that contains ``part``."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if part in block]
    return str(code)


@pytest.mark.parametrize(
    ("part", "noun"), [("layer_dropout(model", "dropout"), ("gated(blocks)", "gates")]
)
def test_the_readme_s_loops_run(part: str, noun: str) -> None:
    import torch

    model = tiny_model(4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batches = [{"input_ids": ids, "labels": torch.tensor([0, 1])}] * 3
    before = [value.detach().clone() for value in model.classifier.parameters()]
    names = {"model": model, "optimizer": optimizer, "batches": batches}
    exec(readme_code(part), names)
    assert sum(names[noun].executed) == 3 * 2  # half of four layers
    assert not any(map(torch.equal, before, model.classifier.parameters()))
    assert all("forward" not in vars(block) for block in find_blocks(model)[1])


def test_the_readme_s_trainer_runs(tmp_path: Path) -> None:
    import torch
    from transformers import TrainingArguments

    model = tiny_model(4)
    rows = [{"input_ids": torch.tensor([1, 2, row]), "labels": row % 2} for row in range(8)]
    settings = {"max_steps": 10, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="no", **settings)
    names = {"model": model, "args": args, "rows": rows}
    exec(readme_code("LayerDropoutCallback"), names)
    logged = [row["active_layers"] for row in names["trainer"].state.log_history if "loss" in row]
    assert logged == [2.0] * 7 + [4.0] * 3
    assert all("forward" not in vars(block) for block in find_blocks(model)[1])
