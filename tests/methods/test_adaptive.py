"""Adaptive: depths and steps by what layers are worth; and defaults of methods."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from droppeft.bandit.layer_values import LayerValues
from droppeft.config import build_config, load_config, to_toml
from droppeft.errors import DroppeftError
from droppeft.flower_server_app import _check_same
from droppeft.layer_dropout.modes import Mode
from droppeft.messages.instruction import modes_of
from droppeft.methods import METHODS
from droppeft.methods.rules import check_settings
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from handmade import setup_for
from runs import Recorder, adapter_bytes, outcome, rows_of, stop_after_a_round
from tiny import save_tiny_model

pytestmark = pytest.mark.usefixtures("state")

ADAPTIVE = METHODS["adaptive"]
BY_VALUE = (
    "adapter.rank=8",
    "frozen.layers=0",
    "configurator.policy=layer_values",
    "configurator.means=[0]",
    "configurator.depths=[[1], [1, 0.67, 0.33, 0.33], [0.5], [0.33]]",
    "configurator.steps=[1, 0.5, 0.25]",
)
"""What the method does with language models."""

SPELT_OUT = (
    "method=droppeft",
    "adapter.rank=16",
    "frozen.layers=3",
    "frozen.cache=false",
    "configurator.policy=budgeted_thompson",
    "configurator.means=[0]",
    "configurator.depths=[[1], [0.66]]",
    "traffic.encoding=int8",
)


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run with six layers and without settings of layer dropout."""
    other = [
        override for override in tiny_overrides if not override.startswith(("dropout.", "model="))
    ]
    return [*other, f"model={save_tiny_model(tmp_path_factory.mktemp('six'), 6)}", "rounds=4"]


@pytest.fixture(scope="module")
def adaptive_run(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adaptive") / "run"
    start_run(load_config(None, [*overrides, "method=adaptive"]), out, Recorder())
    return out


def test_it_is_droppeft_with_these_settings(
    overrides: list[str], adaptive_run: Path, tmp_path: Path
) -> None:
    words = [*overrides, *SPELT_OUT]
    result = start_run(load_config(None, words), tmp_path / "long", Recorder())
    expected = json.loads((adaptive_run / "result.json").read_text())
    assert result["adapter_sha256"] == expected["adapter_sha256"]
    short, long = [rows_of(run / "rounds.jsonl") for run in (adaptive_run, tmp_path / "long")]
    assert [row["notes"] for row in short] == [row["notes"] for row in long]
    assert {arm for row in short for arm in row["notes"]["chosen"].values()} == {0, 1}


def test_a_resumed_run_goes_on_with_the_values_of_layers(
    overrides: list[str], tmp_path: Path
) -> None:
    words = [*overrides, "method=adaptive", *BY_VALUE]
    start_run(load_config(None, words), tmp_path / "whole", Recorder())
    stop_after_a_round(words, tmp_path / "run")
    resume_run(tmp_path / "run", Recorder())
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    notes = [row["notes"] for row in rows_of(tmp_path / "whole" / "rounds.jsonl")]
    values = [note["layer_values"] for note in notes]
    assert all(sum(row) == pytest.approx(6) for row in values)
    assert values[0] != values[1] != values[2]


def test_slow_clients_train_less_and_two_clients_train_every_layer() -> None:
    """Of four layers, upper ones are worth more; a round waits little for the slow clients."""
    setup = setup_for(
        "method=adaptive",
        *BY_VALUE,
        "clock.profiles=jetson_tx2,jetson_agx_xavier",
        "training.local_steps=100",
    )
    state = ADAPTIVE.init(setup)
    values = LayerValues((0.4, 0.8, 1.2, 1.6), (3, 3, 3, 3))
    memory = replace(state.memory, bandit=replace(state.memory.bandit, layers=values))
    assert setup.clock is not None
    slow, fast = (
        [client for client, name in enumerate(setup.clock.fleet.names) if name == profile]
        for profile in ("jetson_tx2", "jetson_agx_xavier")
    )
    cohort = [*slow[:2], *fast]
    instructions = ADAPTIVE.instruct(setup, replace(state, memory=memory), 1, cohort)
    assert {rate for each in instructions if each.dropout for rate in each.dropout.rates} == {0.0}
    names = [setup.clock.fleet.names[client] for client in cohort]
    work: dict[str, list[float]] = {name: [] for name in names}
    for name, each in zip(names, instructions, strict=True):
        layers = sum(modes_of(each).shares()[Mode.TRAIN])
        work[name].append((each.budget.steps or 0) * layers)
    assert max(work["jetson_tx2"]) < min(work["jetson_agx_xavier"]) == 400
    assert sum(map(sum, work.values())) >= 0.85 * 400 * len(cohort)
    complete = [name for name, each in zip(names, instructions, strict=True) if each.starts == (0,)]
    assert complete.count("jetson_agx_xavier") >= 2


@pytest.mark.parametrize(
    "tree", [{"dropout": {"schedule": "recovery"}}, {"sharing": {"fraction": 0.5}}], ids=str
)
def test_settings_of_dropout_and_sharing_are_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(DroppeftError, match="has no effect with method=adaptive"):
        check_settings(build_config({"method": "adaptive", **tree}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("configurator.policy=fixed", r"leave configurator\.policy=fixed out"),
        ("configurator.means=[0, 0.25]", r"drops no layers; leave configurator\.means out"),
    ],
)
def test_settings_that_make_it_another_method_are_refused(override: str, message: str) -> None:
    with pytest.raises(DroppeftError, match=message):
        check_settings(load_config(None, ["method=adaptive", override]))


# Defaults by method


def test_defaults_of_a_method_apply_if_a_setting_is_not_given() -> None:
    default = load_config(None, ["method=adaptive"])
    assert (default.frozen.layers, default.frozen.cache, default.dropout.mean) == (
        "half",
        False,
        0.0,
    )
    chosen = default.configurator
    assert (chosen.policy, chosen.depths) == ("budgeted_thompson", ((1.0,), (0.66,)))
    given = load_config(None, ["method=adaptive", "frozen.layers=1", "configurator.depths=[[1]]"])
    assert (given.frozen.layers, given.frozen.cache) == (1, False)
    assert given.configurator.depths == ((1.0,),)
    assert given.configurator.policy == "budgeted_thompson"
    language = load_config(None, ["method=adaptive", "task=causal_lm", "configurator.steps=[1]"])
    assert (language.frozen.layers, language.adapter.rank) == (0, 8)
    assert (language.configurator.policy, language.configurator.steps) == ("layer_values", (1.0,))
    assert load_config(None, ["method=fedlora"]).frozen.layers == 0


def test_a_setting_replaces_the_default_of_its_alternative() -> None:
    given = load_config(None, ["method=adaptive", "dropout.count=2"]).dropout
    assert (given.count, given.mean) == (2, None)


def test_a_written_configuration_is_read_back_with_its_defaults(tmp_path: Path) -> None:
    config = load_config(None, ["method=adaptive"])
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "config.toml") == config


# Half of the layers


@pytest.mark.parametrize("override", ["-1", "third", "true", "1.5"])
def test_frozen_layers_are_a_number_or_half(override: str) -> None:
    with pytest.raises(DroppeftError, match=r"frozen\.layers: must be a number of layers, .*half"):
        load_config(None, [f"frozen.layers={override}"])


@pytest.mark.full
def test_half_of_the_layers_equals_their_number(overrides: list[str], tmp_path: Path) -> None:
    for layers in ("half", "3"):
        more = ("method=fedlora", f"frozen.layers={layers}", "rounds=1")
        start_run(load_config(None, [*overrides, *more]), tmp_path / layers, Recorder())
    assert adapter_bytes(tmp_path / "half") == adapter_bytes(tmp_path / "3")


def test_a_run_on_flower_is_continued_with_the_same_settings(tmp_path: Path) -> None:
    words = ["method=adaptive", "frozen.layers=half", "threads=1", "accelerator=cpu"]
    wanted = load_config(None, words)
    frozen = wanted.frozen.model_copy(update={"layers": 3})
    for precision in ("fp32", "bf16"):  # of the machine where it began
        training = wanted.training.model_copy(update={"precision": precision})
        saved = wanted.model_copy(update={"frozen": frozen, "training": training})
        _check_same(wanted, saved, tmp_path)
    with pytest.raises(DroppeftError, match="holds a run with another configuration"):
        _check_same(wanted, wanted.model_copy(update={"frozen": frozen, "seed": 1}), tmp_path)
