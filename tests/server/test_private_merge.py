"""Differential privacy of clients: clipping, noise, sensitivity, epsilon, refusals and resuming."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.config import Config, load_config
from droppeft.messages.reply import Failure
from droppeft.messages.server_state import GlobalModel, ServerState
from droppeft.messages.tensors import Tensors, flatten
from droppeft.methods import METHODS
from droppeft.methods.rules import check_settings
from droppeft.runs.export import export_run
from droppeft.server import private_merge
from droppeft.server.privacy_accountant import epsilon, epsilon_spent, with_noise_multiplier
from droppeft.server.private_merge import clipped_change, draw_privately, gaussian, private_update
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from handmade import filled, instruction_for, update_for
from refusals import refused
from runs import Recorder, checkpoint_of, rows_of, stop_after_a_round

PRIVATE = ("method=fedlora", "privacy.noise_multiplier=1", "privacy.delta=0.01")
NAMES = frozenset(name for _, name, _ in flatten(filled(0.0)))


def config(*words: str) -> Config:
    return load_config(None, [*PRIVATE, *words])


def norm(tensors: Tensors | dict[Any, Any], base: Tensors | None = None) -> float:
    pairs = list(flatten(tensors))
    before = {(key, name): value for key, name, value in flatten(base)} if base else {}
    changes = [value - before.get((key, name), 0.0) for key, name, value in pairs]
    return float(np.sqrt(sum(np.square(change, dtype=np.float64).sum() for change in changes)))


# Clipping and sensitivity


@given(
    scale=st.floats(1e-3, 1e3),
    clip_norm=st.floats(1e-3, 1e3),
    layers=st.sets(st.integers(0, 3)),
    seed=st.integers(0, 99),
)
def test_a_change_has_at_most_the_clipping_norm_and_keeps_its_direction(
    scale: float, clip_norm: float, layers: set[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    base = {(key, name): value for key, name, value in flatten(filled(3.0))}
    sent = {
        key: {name: rng.normal(3.0, scale, value.shape).astype(np.float32)}
        for key, name, value in flatten(filled(3.0))
        if key in layers or key == "head"
    }
    clipped = clipped_change(sent, base, clip_norm)
    assert set(clipped) == {(key, name) for key, name, _ in flatten(sent)}
    whole = {place: sent[place[0]][place[1]] - base[place].astype(np.float64) for place in clipped}
    before, after = (
        np.concatenate([changes[place].ravel() for place in clipped])
        for changes in (whole, clipped)
    )
    assert np.linalg.norm(after) <= clip_norm
    expected = min(1.0, clip_norm / np.linalg.norm(before))
    np.testing.assert_allclose(after, expected * before, rtol=1e-9)


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_merge, "gaussian", lambda shape, deviation: np.zeros(shape))


def state() -> ServerState:
    instruction = instruction_for(0)
    return ServerState(GlobalModel(instruction.adapter, instruction.tensors))


@pytest.mark.usefixtures("without_noise")
def test_one_client_changes_the_mean_by_the_clipping_norm_over_the_cohort_at_most() -> None:
    """Whatever it sends, whether it sends, and whichever layers the others share."""
    settings = config("privacy.clip_norm=0.5", "cohort_size=4", "clients=40")
    instructions = [instruction_for(client) for client in range(6)]
    others = [
        replace(update, tensors={key: update.tensors[key] for key in (client % 4, "head")})
        for client, update in enumerate(update_for(one, 9.0) for one in instructions[1:])
    ]
    without = private_update(settings, state(), NAMES, others).tensors
    huge, partial = update_for(instructions[0], -1e30), update_for(instructions[0], 1e3)
    partial = replace(partial, tensors={2: partial.tensors[2]})
    for reply in (huge, partial, Failure(0, "sent no reply")):
        merged = private_update(settings, state(), NAMES, [reply, *others]).tensors
        assert norm(merged, without) <= 0.5 / 4 * (1 + 1e-5)  # tensors are rounded to float32
        same = private_update(settings, state(), NAMES, others).tensors
        assert norm(same, without) == 0.0
    alone = private_update(settings, state(), NAMES, [huge]).tensors
    assert norm(alone, state().model.tensors) == pytest.approx(0.5 / 4, rel=1e-5)


@pytest.mark.usefixtures("without_noise")
def test_equal_weights_whatever_the_rows() -> None:
    settings = config("privacy.clip_norm=100", "cohort_size=2", "clients=40")
    base = state().model.tensors["head"]["head.W"][0]
    replies = [
        update_for(instruction_for(client), value, examples=examples)
        for client, value, examples in ((0, base + 1.0, 8), (1, base + 2.0, 1))
    ]
    merged = private_update(settings, state(), NAMES, replies)
    np.testing.assert_allclose(merged.tensors["head"]["head.W"], base + 1.5, rtol=1e-6)


# Noise


def test_noise_is_normal_with_the_stated_deviation() -> None:
    """With 400,000 values a wrong deviation of 1 % would be ten standard errors off."""
    values = gaussian((400, 1000), 3.0).ravel()
    assert values.std() == pytest.approx(3.0, rel=0.007)
    assert values.mean() == pytest.approx(0.0, abs=0.025)
    shares = [(abs(values) < bound * 3.0).mean() for bound in (0.5, 1.0, 2.0, 3.0)]
    assert shares == pytest.approx([0.38292, 0.68269, 0.95450, 0.99730], abs=0.005)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_every_tensor_that_may_be_sent_gets_noise_even_if_nobody_sends_it() -> None:
    settings = config("privacy.clip_norm=2", "privacy.noise_multiplier=3", "cohort_size=4")
    before = state().model.tensors
    draws = [private_update(settings, state(), NAMES, []).tensors for _ in range(400)]
    for key, name, value in flatten(before):
        changes = np.concatenate([draw[key][name] - value for draw in draws])
        assert changes.std() == pytest.approx(3 * 2 / 4, rel=0.2)
    some = private_update(settings, state(), frozenset({"head.W"}), []).tensors
    assert [name for _, name, _ in flatten(some)] == ["head.W"]


def test_each_client_is_drawn_independently_and_not_by_the_seed() -> None:
    settings = config("clients=2000", "cohort_size=200")
    first, second = draw_privately(settings), draw_privately(settings)
    assert first != second
    for drawn in (first, second):
        assert drawn == sorted({*drawn})
        assert 120 < len(drawn) < 280  # six standard deviations


# Epsilon


def test_epsilon_is_opacus_own_and_grows_with_rounds_and_falls_with_noise() -> None:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(25):
        accountant.step(noise_multiplier=1.1, sample_rate=0.05)
    assert epsilon(1.1, 0.05, 25, 1e-4) == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-12)
    by_rounds = [epsilon(1.1, 0.05, rounds, 1e-4) for rounds in (0, 1, 2, 10, 100)]
    assert by_rounds == sorted({*by_rounds})
    by_noise = [epsilon(noise, 0.05, 10, 1e-4) for noise in (0.5, 1.0, 2.0, 8.0)]
    assert by_noise == sorted({*by_noise}, reverse=True)


@pytest.mark.parametrize("budget", [2.0, 100.0])
def test_the_noise_is_the_least_that_keeps_to_the_budget(budget: float) -> None:
    words = ("clients=1000", "cohort_size=50", "rounds=30", "privacy.delta=1e-4")
    asked = load_config(None, ["method=fedlora", f"privacy.epsilon={budget}", *words])
    found = with_noise_multiplier(asked)
    assert epsilon_spent(found, 30) <= budget
    noise = found.privacy.noise_multiplier
    assert noise is not None
    assert epsilon(noise - 1e-3, 0.05, 30, 1e-4) > budget
    assert with_noise_multiplier(found) == found
    with refused(r"rounds=60 with .* spend epsilon .*, which is more than privacy.epsilon="):
        with_noise_multiplier(found.model_copy(update={"rounds": 60}))


# Refusals


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([*PRIVATE, "method=flora"], "method=flora uses more of what clients send .* fedlora, "),
        ([*PRIVATE, "method=ditto"], "method=ditto uses more of what clients send"),
        ([*PRIVATE, "method=adaptive"], "method=adaptive uses more of what clients send"),
        (
            [*PRIVATE, "method=droppeft", "configurator.policy=budgeted_thompson"],
            "configurator.policy=budgeted_thompson learns from",
        ),
        (
            [*PRIVATE, "method=droppeft", "sharing.fraction=0.5"],
            "sharing.fraction=0.5 lets clients send scores",
        ),
        ([*PRIVATE, "method=droppeft", "sharing.head=personal"], "sharing.head=personal makes"),
        ([*PRIVATE, "evaluation.validation_clients=2"], "validation_clients=2 chooses the deliv"),
        ([*PRIVATE, "evaluation.personalised=true"], "personalised=true writes metrics of each"),
        ([*PRIVATE, "quorum=2"], "quorum=2 merges or not by how many"),
        ([*PRIVATE, "clock.over_selection=1.2"], "over_selection=1.2 lets a client take another"),
        ([*PRIVATE, "privacy.delta=0.05"], r"privacy.delta=0.05 is not less than 1/clients=0.05"),
        (["method=fedlora", "privacy.epsilon=2"], "need privacy.delta too; give a value"),
    ],
)
def test_what_noise_does_not_cover_is_refused(words: Sequence[str], why: str) -> None:
    with refused(why):
        check_settings(load_config(None, list(words)))


def test_the_methods_that_can_be_private_are_those_whose_merge_is_a_mean() -> None:
    able = {name for name, method in METHODS.items() if method.sent is not None}
    others = {"fedia3", "fedbitfit", "fedprefix", "fedprompt", "fedptuning"}
    assert able == {"fedlora", "ffa_lora", "fedra", "legend", "droppeft", *others}
    for name in able:
        check_settings(load_config(None, [*PRIVATE, f"method={name}"]))


# Whole runs


@pytest.fixture
def words(tiny_overrides: list[str]) -> list[str]:
    budget = ("privacy.epsilon=30", "privacy.delta=0.1", "privacy.clip_norm=0.5")
    return [*tiny_overrides, "cohort_size=3", *budget]


RAW = ("examples", "targets", "train_loss", "importance", "scores", "reward", "tokens", "steps")


def test_a_private_run_states_what_it_spends_and_no_value_of_a_client(
    words: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = start_run(load_config(None, words), out, Recorder())
    saved = load_config(out / "config.toml")
    spent = [row["epsilon"] for row in rows_of(out / "rounds.jsonl")]
    assert spent == [epsilon_spent(saved, number) for number in (1, 2, 3)]
    assert spent[-1] <= 30
    assert result["privacy"]["epsilon"] == spent[-1]
    assert (result["privacy"]["releases"], result["delivered_round"]) == (3, 3)
    assert any("differentially private" in sentence for sentence in result["conclusion"])
    for row in rows_of(out / "clients.jsonl"):
        assert not {*RAW} & row.keys()
    for row in rows_of(out / "rounds.jsonl"):
        assert (row["train_loss"], row["importance"], row["validation_loss"]) == (None, [], None)


def test_rounds_that_are_repeated_are_counted_again(words: list[str], tmp_path: Path) -> None:
    out, noise = tmp_path / "run", "privacy.noise_multiplier=1"
    asked = load_config(None, [*words, "privacy.epsilon=1000", noise])
    budget = (epsilon_spent(asked, 4) + epsilon_spent(asked, 5)) / 2
    stop_after_a_round([*words, f"privacy.epsilon={budget}", noise], out)
    whole = (out / "rounds.jsonl").read_bytes()
    newest = out / "checkpoints" / "round-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    result = resume_run(out, Recorder())
    assert [row["round"] for row in rows_of(out / "rounds.jsonl")] == [1, 2, 3]
    assert whole.splitlines()[0] not in (out / "rounds.jsonl").read_bytes().splitlines()
    saved = load_config(out / "config.toml")
    assert result["privacy"]["releases"] == 4
    assert result["privacy"]["epsilon"] == epsilon_spent(saved, 4) > epsilon_spent(saved, 3)
    assert checkpoint_of(out).facts["lost_releases"] == 1
    with refused("rounds=4 and 1 that had to be repeated with privacy.noise_multiplier=1 spend"):
        resume_run(out, Recorder(), rounds=4)
    assert json.loads((out / "result.json").read_text())["privacy"]["releases"] == 4


def test_a_run_that_repeated_a_round_stops_before_it_exceeds_its_budget(
    words: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop_after_a_round(words, out)
    newest = out / "checkpoints" / "round-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    for _ in range(2):
        with refused("round 3 would spend epsilon .* because 1 round had to be repeated; the run"):
            resume_run(out, Recorder())
        assert [row["epsilon"] <= 30 for row in rows_of(out / "rounds.jsonl")] == [True, True]
    assert export_run(out).round == 2


def test_a_run_without_privacy_says_nothing_of_it(whole_run: Path) -> None:
    result = json.loads((whole_run / "result.json").read_text())
    assert result["privacy"] is None
    assert [row["epsilon"] for row in rows_of(whole_run / "rounds.jsonl")] == [None] * 3
