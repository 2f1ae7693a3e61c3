"""A run can begin with the values of another run, or of an adapter in PEFT's format."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from droppeft.config import load_config
from droppeft.messages.tensors import Tensors, flatten
from droppeft.runs.export import saved_model
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from refusals import refused
from runs import Recorder, checkpoint_of, outcome, stop_after_a_round

QUICK = ("rounds=2", "evaluation.personalised=false")


def run(words: Sequence[str], out: Path, *more: str) -> dict[str, Any]:
    return start_run(load_config(None, [*words, *QUICK, *more]), out, Recorder())


def values(tensors: Tensors) -> dict[str, list[float]]:
    return {name: array.ravel().tolist() for _, name, array in flatten(tensors)}


@pytest.mark.parametrize("what", ["run", "PEFT folder"])
def test_a_run_begins_with_the_delivered_model(
    what: str, tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    folder = whole_run if what == "run" else whole_run / "adapter"
    result = run(tiny_overrides, tmp_path / "run", f"start_from={folder}")
    first = checkpoint_of(tmp_path / "run", 0)
    delivered = saved_model(whole_run, None, None)[1].state.model
    assert values(first.state.model.tensors) == values(delivered.tensors)
    with_it = json.loads((whole_run / "result.json").read_text())["global_loss"]
    assert abs(first.facts["initial"]["loss"] - with_it) < 0.1 * with_it
    assert result["initial_loss"] == first.facts["initial"]["loss"]


def test_a_stopped_run_needs_its_start_values_no_longer(
    tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(whole_run / "adapter", folder)
    words = [*tiny_overrides, *QUICK, f"start_from={folder}"]
    start_run(load_config(None, words), tmp_path / "whole", Recorder())
    stop_after_a_round(words, tmp_path / "stopped")
    shutil.rmtree(folder)
    resume_run(tmp_path / "stopped", Recorder())
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_an_extended_run_with_a_constant_learning_rate_is_one_with_all_rounds(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    words = [*tiny_overrides, "training.schedule=constant", "training.warmup_fraction=0"]
    start_run(load_config(None, [*words, "rounds=4"]), tmp_path / "long", Recorder())
    out = tmp_path / "short"
    short = start_run(load_config(None, [*words, "rounds=2"]), out, Recorder())
    resume_run(out, Recorder(), rounds=4)
    assert outcome(out) == outcome(tmp_path / "long")
    kept = json.loads((out / "result-round-2.json").read_text())
    assert kept == json.loads(json.dumps(short))


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_gets_no_fewer_rounds(whole_run: Path, tmp_path: Path, rounds: int) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    with refused(f"rounds={rounds}: .* has 3 rounds; give a larger number"):
        resume_run(out, Recorder(), rounds=rounds)
    assert outcome(out) == outcome(whole_run)


def _other_alpha(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 99}))


def _without_a_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


WRONG = {
    "a folder with neither": (lambda folder: shutil.rmtree(folder), "holds neither a run"),
    "another alpha": (_other_alpha, "lora_alpha is 99 there, .* set adapter"),
    "a tensor is missing": (_without_a_tensor, "lacks base_model"),
    "damaged": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"half"),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_values_that_do_not_fit_are_refused(
    case: str, tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(whole_run / "adapter", folder)
    spoil, part = WRONG[case]
    spoil(folder)
    with refused(f"start_from={folder}: {part}"):
        run(tiny_overrides, tmp_path / "run", f"start_from={folder}")
    assert not (tmp_path / "run").exists()


def test_another_rank_and_frozen_values_are_refused(
    tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    for folder, part in ((whole_run / "adapter", "does not fit"), (whole_run, "another adapter")):
        settings = ("adapter.rank=4", "adapter.alpha=16", f"start_from={folder}")
        with refused(part):
            run(tiny_overrides, tmp_path / "run", *settings)
    words = [word for word in tiny_overrides if not word.startswith(("method=", "dropout"))]
    bottlenecks = [*words, "method=fedadapter", "clients=6", "cohort_size=3"]
    with refused("method=fedadapter begins with several models"):
        run(bottlenecks, tmp_path / "run", f"start_from={whole_run}")
    with refused("method=ffa_lora clients compute .* from the seed"):
        run(words, tmp_path / "run", "method=ffa_lora", f"start_from={whole_run}")
