"""Runs with frozen layers: the same bits, whatever states are still on the clients' disks."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import droppeft.server.run
from droppeft.cached_layers import cached_layers
from droppeft.cached_layers.cached_layers import CachedLayers, state_folder
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from runs import Recorder, adapter_bytes, outcome, rows_of

FROZEN = ("frozen.layers=2", "frozen.precision=fp32", "dropout.mean=0")
ALL_CLIENTS = ("clients=2", "cohort_size=2")


def run(overrides: list[str], out: Path, *more: str) -> dict[str, Any]:
    return start_run(load_config(None, [*overrides, *FROZEN, *more]), out, Recorder())


def tensors(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(out / "adapter" / "adapter_model.safetensors")
    return found


def cache_costs(out: Path) -> list[dict[str, Any]]:
    return [row["cached_layers"] for row in rows_of(out / "clients.jsonl")]


@pytest.fixture(scope="module")
def frozen_run(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two clients that both train in every round."""
    out = tmp_path_factory.mktemp("frozen") / "run"
    run(tiny_overrides, out, *ALL_CLIENTS)
    return out


def test_frozen_layers_train_nothing_and_send_nothing(frozen_run: Path) -> None:
    for row in rows_of(frozen_run / "clients.jsonl"):
        assert row["active_steps"] == [0, 0, 2, 2]
        assert row["importance"][:2] == [0, 0]
    layers = {name.split(".layer.")[1][0] for name in tensors(frozen_run) if ".layer." in name}
    assert layers == {"2", "3"}


def test_later_rounds_find_the_states_of_earlier_ones(frozen_run: Path) -> None:
    counts = cache_costs(frozen_run)
    rows = 2 * 4  # steps of a local training, rows of a step
    assert all(count["hits"] + count["built"] == rows for count in counts)
    assert all(count["built"] > 0 for count in counts[:2])
    assert sum(count["hits"] for count in counts[2:]) > 0
    for count in counts:
        assert count["stored_bytes"] > 0
        assert count["build_wall_s"] > 0
        assert count["built_tokens"] >= count["built"]


@pytest.mark.sample("*=0.002")
@pytest.mark.parametrize("more", ["frozen.limit_mb=0.002", "frozen.limit_mb=0.000001"])
def test_deleted_states_are_computed_again_to_the_same_bits(
    frozen_run: Path, tiny_overrides: list[str], tmp_path: Path, more: str
) -> None:
    run(tiny_overrides, tmp_path / "run", *ALL_CLIENTS, more)
    built = [
        sum(cost["built"] for cost in cache_costs(out)) for out in (tmp_path / "run", frozen_run)
    ]
    assert built[0] > built[1]
    assert tensors(tmp_path / "run").keys() == tensors(frozen_run).keys()
    for name, value in tensors(tmp_path / "run").items():
        assert torch.equal(value, tensors(frozen_run)[name]), name


def test_states_lost_between_rounds_are_computed_again_to_the_same_bits(
    frozen_run: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    class DeletesStates(Recorder):
        def started(self, about: Any, rows: Any) -> None:
            self.run = about["run"]

        def round_done(self, row: Any) -> None:
            folder = state_folder(self.run)
            assert any(folder.iterdir())
            shutil.rmtree(folder)

    config = load_config(None, [*tiny_overrides, *FROZEN, *ALL_CLIENTS])
    start_run(config, tmp_path / "run", DeletesStates())
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(frozen_run)


def test_a_resumed_run_has_the_rows_of_the_uninterrupted_one(
    frozen_run: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lost round had stored states; when it runs again, it must not find them."""

    def crash(*_: Any) -> None:
        raise MemoryError

    class CrashesInRoundTwo(Recorder):
        def round_done(self, row: Any) -> None:
            monkeypatch.setattr(droppeft.server.run, "append_rows", crash)

    config = load_config(None, [*tiny_overrides, *FROZEN, *ALL_CLIENTS])
    with pytest.raises(MemoryError):
        start_run(config, tmp_path / "run", CrashesInRoundTwo())
    monkeypatch.undo()
    resume_run(tmp_path / "run", Recorder())
    assert outcome(tmp_path / "run") == outcome(frozen_run)


def test_states_are_deleted_when_the_run_ends(frozen_run: Path) -> None:
    run = json.loads((frozen_run / "result.json").read_text())["run"]
    assert not state_folder(run).exists()


def test_without_a_cache_a_batch_of_one_gives_the_same_bits(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    for name, cache in (("with", "true"), ("without", "false")):
        more = ("rounds=2", "training.batch_size=1", f"frozen.cache={cache}")
        run(tiny_overrides, tmp_path / name, *more)
    expected = tensors(tmp_path / "with")
    for name, value in tensors(tmp_path / "without").items():
        assert torch.equal(value, expected[name]), name
    assert all(count["hits"] == 0 for count in cache_costs(tmp_path / "without"))


def test_without_a_cache_other_batches_differ_by_rounding_alone(
    frozen_run: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    run(tiny_overrides, tmp_path / "run", *ALL_CLIENTS, "frozen.cache=false")
    expected = tensors(frozen_run)
    for name, value in tensors(tmp_path / "run").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_layers_after_the_frozen_ones_are_dropped_as_if_they_were_the_whole_model(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    overrides = [override for override in tiny_overrides if not override.startswith("dropout")]
    overrides += ["rounds=1", "frozen.layers=1", "dropout.count=1", "training.checkpointing=true"]
    start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    for row in rows_of(tmp_path / "run" / "clients.jsonl"):
        assert row["rates"] == [0, 0, 1, 0]
        assert row["active_steps"] == [0, 2, 0, 2]


def test_the_other_method_can_freeze_layers_too(tiny_overrides: list[str], tmp_path: Path) -> None:
    overrides = [override for override in tiny_overrides if not override.startswith("dropout")]
    overrides += ["rounds=1", "method=fedlora", "frozen.layers=3", "frozen.cache=false"]
    start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    assert rows_of(tmp_path / "run" / "clients.jsonl")[0]["active_steps"] == [0, 0, 0, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["frozen.layers=4"], "leaves none of the 4 layers to train"),
        (["frozen.layers=1", "dropout.count=2"], "dropout.count=2 is impossible"),
        (["frozen.layers=2", "dropout.rates=[0, 0.5, 0.5, 0]"], "set the first 2 rates to 0"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    tiny_overrides: list[str], tmp_path: Path, overrides: list[str], message: str
) -> None:
    without_dropout = [
        override for override in tiny_overrides if not override.startswith("dropout")
    ]
    with pytest.raises(DroppeftError, match=message):
        start_run(load_config(None, [*without_dropout, *overrides]), tmp_path / "run", Recorder())
    assert not (tmp_path / "run").exists()


def test_states_that_do_not_fit_their_precision_are_an_error(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def huge(*_: Any) -> torch.Tensor:
        return torch.full((1, 3, 8), 1e6)

    monkeypatch.setattr(CachedLayers, "_compute_batch", huge)
    with pytest.raises(DroppeftError, match=r"do not fit into fp16; set frozen\.precision=bf16"):
        run(tiny_overrides, tmp_path / "run", "frozen.precision=fp16")


FACTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "weights": lambda facts: facts.update(weights="others"),
    "base_delta": lambda facts: facts.update(base_delta="v2"),
    "depth": lambda facts: facts.update(depth=3),
    "stored": lambda facts: facts.update(stored="bf16"),
}


@pytest.mark.parametrize("change", FACTS)
def test_another_content_has_another_name(change: str) -> None:
    facts: dict[str, Any] = {"weights": "w", "base_delta": "", "depth": 2, "stored": "fp16"}
    before = cached_layers.content_name(**facts)
    assert cached_layers.content_name(**dict(reversed(facts.items()))) == before
    FACTS[change](facts)
    assert cached_layers.content_name(**facts) != before


def test_quality_is_measured_with_the_whole_model(frozen_run: Path) -> None:
    result = json.loads((frozen_run / "result.json").read_text())
    assert np.isfinite(result["global_loss"])
    assert result["num_layers"] == 4


def test_states_of_unfinished_runs_are_deleted_after_a_week(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path))
    ages = {"old": 8, "recent": 6}
    for name, days in ages.items():
        file = tmp_path / cached_layers.STATES / name / "client-0" / "round-000001-0000.safetensors"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"states")
        for path in (file, file.parent, file.parent.parent):
            os.utime(path, times=(time.time() - days * 86400,) * 2)
    run(tiny_overrides, tmp_path / "run", "rounds=1")
    assert {path.name for path in (tmp_path / cached_layers.STATES).iterdir()} == {"recent"}
