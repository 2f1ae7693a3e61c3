"""Whole runs whose steps end their backward pass at different depths (`backward.depths`)."""

import json
from pathlib import Path

import pytest

import droppeft.server.run
from droppeft.config import load_config
from droppeft.report.layers import of_layers
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from runs import Recorder, adapter_bytes, outcome, rows_of, timeless

TRUNCATED = ("backward.depths=[1, 0.5]", "dropout.mean=0", "training.local_steps=4")


@pytest.fixture(scope="module")
def truncated(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_overrides, tmp_path_factory.mktemp("truncated") / "run")


def run(tiny_overrides: list[str], out: Path, *more: str) -> Path:
    plain = [one for one in tiny_overrides if not one.startswith(("dropout.", "training.local_"))]
    start_run(load_config(None, [*plain, *TRUNCATED, *more]), out, Recorder())
    return out


def test_the_ledger_says_what_layers_did(truncated: Path) -> None:
    """Four layers, of which a step trains all or the upper two."""
    clients = rows_of(truncated / "clients.jsonl")
    lower = [row["active_steps"][0] for row in clients]
    assert 0 < sum(lower) < 4 * len(clients)
    for row, steps in zip(clients, lower, strict=True):
        assert row["active_steps"] == [steps, steps, 4, 4]
        for trained, forward in zip(row["layer_tokens"], row["forward_tokens"], strict=True):
            assert trained + forward == row["tokens"]
    for row in rows_of(truncated / "rounds.jsonl"):
        trained, forward, skipped = (
            row[f"mean_{what}_layers"] for what in ("active", "forward", "skipped")
        )
        assert trained == sum(row["layer_steps"]) / (4 * row["accepted"])
        assert 2 <= trained <= 4
        assert skipped == 0
        assert trained + forward == pytest.approx(4)
    result = json.loads((truncated / "result.json").read_text())
    assert 0 < result["mean_forward_layers"] < 2
    assert result["mean_skipped_layers"] == 0


def test_the_report_shows_what_was_trained(truncated: Path) -> None:
    rounds = rows_of(truncated / "rounds.jsonl")
    assert "trained-1" in of_layers(1, "truncated", [rounds])
    full = [{**row, "layer_steps": [8] * 4, "mean_active_layers": 4.0} for row in rounds]
    assert "trained-1" not in of_layers(1, "full", [full])


@pytest.mark.parametrize(
    "more", ["workers=2", pytest.param("transport=flower", marks=pytest.mark.full)]
)
def test_the_bytes_are_the_same_wherever_clients_run(
    truncated: Path, tiny_overrides: list[str], tmp_path: Path, more: str
) -> None:
    other = run(tiny_overrides, tmp_path / "run", more)
    assert adapter_bytes(other) == adapter_bytes(truncated)
    for name in ("rounds.jsonl", "clients.jsonl"):
        assert timeless(rows_of(other / name)) == timeless(rows_of(truncated / name))


def test_a_resumed_run_equals_the_uninterrupted_one(
    truncated: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CrashesInRoundTwo(Recorder):
        def round_done(self, row: object) -> None:
            monkeypatch.setattr(droppeft.server.run, "append_rows", crash)

    def crash(*_: object) -> None:
        raise MemoryError

    plain = [one for one in tiny_overrides if not one.startswith(("dropout.", "training.local_"))]
    with pytest.raises(MemoryError):
        start_run(load_config(None, [*plain, *TRUNCATED]), tmp_path / "run", CrashesInRoundTwo())
    monkeypatch.undo()
    resume_run(tmp_path / "run", Recorder())
    assert outcome(tmp_path / "run") == outcome(truncated)


def test_all_layers_in_every_step_is_the_default(
    truncated: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """And so it has the bytes of FedLoRA, which knows no modes."""
    full = run(tiny_overrides, tmp_path / "full", "backward.depths=[1, 1]")
    lora = run(tiny_overrides, tmp_path / "lora", "method=fedlora", *NO_TABLES)
    assert (
        adapter_bytes(full)["adapter_model.safetensors"]
        == (adapter_bytes(lora)["adapter_model.safetensors"])
    )
    assert adapter_bytes(full) != adapter_bytes(truncated)


NO_TABLES = ("backward.depths=[1]", "dropout.mean=0.3333333333333333")
"""Values that :data:`TRUNCATED` sets and that only `droppeft` has, at their defaults."""
