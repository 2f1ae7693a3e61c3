"""Runs that measure their layers first: on rows of no client, once, and with the same bytes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from droppeft.client.run_inputs import count_clients, read_data, set_aside
from droppeft.config import load_config
from droppeft.layer_dropout import Calibration
from droppeft.methods import METHODS
from droppeft.report.run_page import write_run_page
from droppeft.server import prepare as preparing
from droppeft.server.prepare import Prepared
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from runs import Recorder, adapter_bytes, checkpoint_of, outcome, prepared_run, stop_after_a_round

ASIDE = 36
"""A fifth of the 180 training rows."""


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, "dropout.shape=calibrated"]


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "run"
    start_run(load_config(None, overrides), out, Recorder())
    return out


def calibration_of(prepared: Prepared) -> Calibration:
    assert prepared.setup.calibration is not None
    return prepared.setup.calibration


def test_no_client_has_the_rows_on_which_layers_are_measured(overrides: list[str]) -> None:
    prepared = prepared_run(*overrides)
    loaded, found = prepared.loaded, prepared.findings
    held = [int(row) for one in loaded.clients for part in one.parts for row in part]
    assert len(held) == len({*held})
    assert {*held}.isdisjoint(loaded.set_aside.tolist())
    assert sorted([*held, *loaded.set_aside.tolist()]) == list(range(180))
    assert (found.set_aside_rows, found.train_rows) == (ASIDE, 180 - ASIDE)
    assert found.rows_read == found.train_rows + found.test_rows + found.set_aside_rows
    sentence = "36 training rows were set aside for calibration and given to no client"
    assert sentence in found.sentences()
    measured = calibration_of(prepared)
    assert (measured.rows, measured.head_rows) == (ASIDE // 2, ASIDE // 2)


def test_clients_get_the_rates_that_follow(overrides: list[str], finished: Path) -> None:
    prepared = prepared_run(*overrides)
    measured = calibration_of(prepared)
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    assert instruction.dropout is not None
    assert instruction.dropout.rates == measured.rates(0.25)
    assert math.fsum(instruction.dropout.rates) == pytest.approx(1)
    found = json.loads((finished / "result.json").read_text())["calibration"]
    assert found["rates"] == list(measured.rates(0.25))
    assert found["added_loss"] == list(measured.added_loss)


def test_a_stopped_run_ends_the_same_and_measures_once(
    overrides: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    stop_after_a_round(overrides, out)
    monkeypatch.setattr(preparing, "_calibrated", lambda *values: pytest.fail("measured again"))
    listener = Recorder()
    resume_run(out, listener)
    assert outcome(out) == outcome(finished)


@pytest.mark.full
def test_the_number_of_workers_changes_nothing(
    overrides: list[str], finished: Path, tmp_path: Path
) -> None:
    start_run(load_config(None, [*overrides, "workers=2"]), tmp_path / "run", Recorder())
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished)


def test_measuring_is_announced_and_shown(finished: Path, overrides: list[str]) -> None:
    text = write_run_page(finished).read_text(encoding="utf-8")
    assert "What each layer is worth" in text
    assert "added loss, nats" in text
    steps: list[str] = []
    config = load_config(None, overrides)
    preparing.prepare(config.model_copy(update={"accelerator": "cpu"}), steps.append)
    assert "measuring what each layer is worth" in steps


def with_made_up_losses(prepared: Prepared) -> Prepared:
    """Layer 0 is expensive, and layer 1 adds least."""
    made_up = replace(
        calibration_of(prepared), added_loss=(9.0, 0.1, 0.2, 0.2), added_loss_error=(0.0,) * 4
    )
    return replace(prepared, setup=replace(prepared.setup, calibration=made_up))


@pytest.mark.parametrize(
    ("extra", "rates"),
    [
        (["dropout.count=1"], (0.0, 0.5, 0.25, 0.25)),
        (["dropout.count=1", "dropout.protect_first=2"], (0.0, 0.0, 0.5, 0.5)),
        (["dropout.count=4"], (1.0, 1.0, 1.0, 1.0)),
        (["dropout.mean=0.5", "frozen.layers=2"], (0.0, 0.0, 0.5, 0.5)),
    ],
)
def test_expensive_layers_are_protected(
    extra: list[str], rates: tuple[float, ...], overrides: list[str]
) -> None:
    plain = [word for word in overrides if not word.startswith("dropout.mean")]
    prepared = with_made_up_losses(prepared_run(*plain, *extra))
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    assert instruction.dropout is not None
    assert instruction.dropout.rates == pytest.approx(rates)


def test_the_methods_that_drop_layers_use_it(overrides: list[str]) -> None:
    prepared = with_made_up_losses(prepared_run(*overrides, "method=fedra"))
    every = METHODS["fedra"].instruct(prepared.setup, prepared.state, 1, list(range(4)) * 5)
    dropped = {one.dropout.rates for one in every if one.dropout}
    assert len(dropped) > 1
    assert {rates[0] for rates in dropped} == {0}
    plain = [word for word in overrides if not word.startswith("dropout.mean")]
    bandit = ("configurator.policy=uniform_random", "configurator.means=[0.25]")
    arms = with_made_up_losses(prepared_run(*plain, *bandit, "configurator.depths=[[1]]"))
    [instruction] = arms.method.instruct(arms.setup, arms.state, 1, [0])
    assert instruction.dropout is not None
    assert instruction.dropout.rates == pytest.approx((0.0, 0.5, 0.25, 0.25))


def test_owners_are_counted_without_the_rows_that_are_set_aside(
    overrides: list[str], tmp_path: Path
) -> None:
    """An owner may have too few rows then, and is no client."""
    lines = [f"t{row},{'ab'[row % 2]},{'xyz'[min(row // 10, 2)]}" for row in range(60)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label,who", *lines]))
    (tmp_path / "test.csv").write_text("text,label\nt,a\nu,b\n")
    words = [word for word in overrides if not word.startswith(("clients", "cohort", "data"))]
    natural = [f"data={tmp_path}", "partition.kind=natural", "partition.key=who"]
    config = load_config(None, [*words, *natural, "partition.min_rows=9"])
    read = read_data(config)
    aside = set_aside(config, read.corpus.train)
    left = np.delete(np.array(read.corpus.train.keys), aside)
    enough = [who for who in "xyz" if (left == who).sum() >= 9]
    assert len(enough) < 3
    resolved = count_clients(config, read)
    assert resolved.clients == len(enough)
    found = prepared_run(*words, *natural, "partition.min_rows=9", f"clients={len(enough)}")
    counts: Any = found.findings
    assert counts.rows_read == (
        counts.train_rows + counts.test_rows + counts.set_aside_rows + counts.left_out_rows
    )


def test_checkpoints_have_what_was_measured(finished: Path) -> None:
    facts = checkpoint_of(finished).facts
    result = json.loads((finished / "result.json").read_text())
    assert facts["calibration"] == {
        name: value for name, value in result["calibration"].items() if name != "rates"
    }
