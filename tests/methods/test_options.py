"""Options of several methods: FedProx, server optimizers, and methods named after PEFT types."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from droppeft.client.run_inputs import clients_of
from droppeft.config import AdapterConfig, ServerConfig, as_tree, build_config, load_config, to_toml
from droppeft.messages.reply import Failure
from droppeft.messages.tensors import flatten
from droppeft.methods import METHODS
from droppeft.methods.other_types import OTHER_TYPES
from droppeft.server.prepare import prepare
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from droppeft.sharing import server_optimizer
from droppeft.sharing.server_optimizer import step
from handmade import setup_for, shaped, update_for
from runs import Recorder, outcome, stop_after_a_round, update_of

pytestmark = pytest.mark.usefixtures("state")


def settings(**values: Any) -> ServerConfig:
    return ServerConfig.model_validate(values)


def stepped(config: ServerConfig, means: list[float]) -> list[float]:
    """Values of one parameter, initially 1, after rounds with these means of the updates."""
    values, moments, found = {0: {"w": np.array([1.0], np.float32)}}, {}, []
    for mean in means:
        target = {0: {"w": np.array([mean], np.float32)}}
        values, moments = step(config, values, target, {"w"}, moments)
        found.append(float(values[0]["w"][0]))
    return found


# Server optimizers


@pytest.fixture
def round_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants with which the steps are easy to compute by hand."""
    monkeypatch.setattr(server_optimizer, "MOMENTUM", 0.5)
    monkeypatch.setattr(server_optimizer, "SECOND_MOMENTUM", 0.75)
    monkeypatch.setattr(server_optimizer, "TAU", 1.0)


@pytest.mark.usefixtures("round_constants")
def test_momentum_by_hand() -> None:
    # Change 1: m = 1, w = 2; then the mean is 3, change 1: m = 0.5 + 1, w = 3.5.
    assert stepped(settings(optimizer="momentum"), [2.0, 3.0]) == [2.0, 3.5]


@pytest.mark.usefixtures("round_constants")
def test_adam_by_hand() -> None:
    first, second = stepped(settings(optimizer="adam", step_size=0.1), [3.0, 3.0])
    # Change 2: m = 1, s = .75 · 1 + .25 · 4 = 1.75
    assert first == pytest.approx(1 + 0.1 * 1 / (1.75**0.5 + 1))
    change = 3 - first
    m, s = 0.5 + 0.5 * change, 0.75 * 1.75 + 0.25 * change**2
    assert second == pytest.approx(first + 0.1 * m / (s**0.5 + 1))


@pytest.mark.usefixtures("round_constants")
def test_yogi_by_hand() -> None:
    first, second = stepped(settings(optimizer="yogi", step_size=0.1), [3.0, 1.5])
    # Change 2: s = 1 - .25 · 4 · sign(1 - 4) = 2
    assert first == pytest.approx(1 + 0.1 * 1 / (2**0.5 + 1))
    change = 1.5 - first
    m, s = 0.5 + 0.5 * change, 2 - 0.25 * change**2
    assert second == pytest.approx(first + 0.1 * m / (s**0.5 + 1))


@pytest.mark.parametrize(("name", "rate"), [("momentum", 1.0), ("adam", 0.01), ("yogi", 0.01)])
def test_every_optimizer_has_a_default_step_size(name: str, rate: float) -> None:
    assert settings(optimizer=name).rate == rate
    assert settings(optimizer=name, step_size=0.5).rate == 0.5


def test_an_override_of_the_optimizer_brings_its_default_step_size(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(to_toml(load_config(None, ["server.optimizer=momentum"])))
    assert load_config(file, ["server.optimizer=adam"]).server.rate == 0.01


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
def test_a_tensor_that_no_client_sent_keeps_value_and_moments(name: str) -> None:
    setup = setup_for("method=fedlora", f"server.optimizer={name}")
    method = METHODS["fedlora"]
    state = method.init(setup)
    instructions = method.instruct(setup, state, 1, [0])
    state = method.merge(setup, state, instructions, [update_for(instructions[0], 5.0)])
    part = update_for(instructions[0], 9.0)
    tensors = {key: named for key, named in part.tensors.items() if key != 1}
    after = method.merge(
        setup, state, instructions, [update_for(instructions[0], 9.0, tensors=tensors)]
    )
    assert after.model.tensors[1]["layer.1.A"][0] == state.model.tensors[1]["layer.1.A"][0]
    assert after.model.tensors[2]["layer.2.A"][0] > state.model.tensors[2]["layer.2.A"][0]
    for which, moment in after.alternatives.items():
        before = state.alternatives[which].tensors
        assert moment.tensors[1]["layer.1.A"][0] == before[1]["layer.1.A"][0]
        assert moment.tensors[2]["layer.2.A"][0] != before[2]["layer.2.A"][0]


def test_a_round_without_updates_leaves_the_state() -> None:
    setup = setup_for("method=fedlora", "server.optimizer=momentum")
    method = METHODS["fedlora"]
    state = method.init(setup)
    instructions = method.instruct(setup, state, 1, [0])
    state = method.merge(setup, state, instructions, [update_for(instructions[0], 5.0)])
    assert method.merge(setup, state, instructions, [Failure(0, "asleep")]) == state


def test_momentum_applies_to_droppeft_too() -> None:
    setup, method = setup_for("server.optimizer=momentum"), METHODS["droppeft"]
    state = method.init(setup)
    for round in (1, 2):
        instructions = method.instruct(setup, state, round, [0, 1])
        state = method.merge(
            setup,
            state,
            instructions,
            [update_for(instruction, 5.0) for instruction in instructions],
        )
    # 1 → 5 by a change of 4; then m = .9 · 4 + 0.
    assert state.model.tensors[3]["layer.3.A"][0] == pytest.approx(8.6)


@pytest.mark.sample("droppeft")
@pytest.mark.parametrize("method", ["fedlora", "droppeft"])
def test_a_resumed_run_has_the_saved_moments(
    method: str, tiny_overrides: list[str], tmp_path: Path
) -> None:
    overrides = [override for override in tiny_overrides if not override.startswith("dropout.")]
    overrides += [f"method={method}", "server.optimizer=yogi", "server.step_size=0.05"]
    start_run(load_config(None, overrides), tmp_path / "whole", Recorder())
    stop_after_a_round(overrides, tmp_path / "resumed")
    resume_run(tmp_path / "resumed", Recorder())
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "resumed")


# FedProx


@pytest.mark.parametrize("name", METHODS)
def test_every_method_instructs_the_proximal_term(name: str) -> None:
    setup, method = shaped(f"method={name}", "training.proximal=0.5"), METHODS[name]
    instructions = method.instruct(setup, method.init(setup), 1, [0, 1, 2])
    assert [instruction.objective.proximal for instruction in instructions] == [0.5] * 3


def test_a_proximal_term_limits_the_change(tiny_overrides: list[str]) -> None:
    def moved(proximal: float) -> float:
        overrides = [*tiny_overrides, f"training.proximal={proximal}", "training.local_steps=10"]
        prepared = prepare(load_config(None, overrides), lambda step: None, "00c0ffee")
        [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [1])
        reply = update_of(clients_of(prepared.loaded), instruction)
        return float(
            sum(
                np.square(array - instruction.tensors[key][name]).sum()
                for key, name, array in flatten(reply.tensors)
            )
        )

    assert moved(0.0) > moved(1.0) > moved(100.0)


# Methods named after PEFT types


@pytest.mark.parametrize(
    ("name", "type_"),
    [
        ("fedprompt", "prompt_tuning"),
        ("fedptuning", "p_tuning"),
        ("fedprefix", "prefix_tuning"),
        ("fedia3", "ia3"),
        ("fedbitfit", "beft"),
        ("fedadapter", "bottleneck"),
    ],
)
def test_a_method_sets_its_adapter_type(name: str, type_: str) -> None:
    found = load_config(None, [f"method={name}"])
    targets = ("all-linear",) if name == "fedbitfit" else ("default",)
    expected = AdapterConfig.model_validate({"type": type_, "targets": targets})
    assert found.adapter == expected
    assert load_config(None, [f"method={name}", f"adapter.type={type_}"]).adapter == expected
    assert build_config(as_tree(found)) == found


@pytest.mark.sample("method=fedlora", "method=ffa_lora", "method=fedsa_lora", "method=fedprompt")
@pytest.mark.parametrize(
    "overrides",
    [
        *((f"method={name}",) for name in ("fedlora", "ffa_lora", "fedsa_lora", *OTHER_TYPES)),
        ("adapter.type=bottleneck",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_shared_tensors_are_averaged_by_targets(
    overrides: tuple[str, ...], tiny_overrides: list[str]
) -> None:
    """The mean of 1 (one row) and 5 (three rows) is 4; tensors that are not sent do not change."""
    plain = [override for override in tiny_overrides if not override.startswith("dropout.")]
    prepared = prepare(load_config(None, [*plain, *overrides]), lambda step: None, "00c0ffee")
    method, setup, before = prepared.method, prepared.setup, prepared.state
    instructions = method.instruct(setup, before, 1, [0, 1])
    updates = [
        update_for(instruction, value, examples=examples)
        for instruction, value, examples in zip(instructions, (1.0, 5.0), (1, 3), strict=True)
    ]
    sent = {name for _, name, _ in flatten(updates[0].tensors)}
    after = method.merge(setup, before, instructions, updates)
    for key, name, array in flatten(after.model.tensors):
        expected = 4.0 if name in sent else before.model.tensors[key][name]
        np.testing.assert_array_equal(array, expected)
    stays = {"ffa_lora": ".lora_A.", "fedsa_lora": ".lora_B."}.get(prepared.config.method)
    everything = {name for _, name, _ in flatten(before.model.tensors)}
    assert sent == {name for name in everything if stays is None or stays not in name}


def test_given_adapter_settings_are_used() -> None:
    overrides = ["method=fedprompt", "adapter.tokens=3"]
    assert load_config(None, overrides).adapter.tokens == 3
    overrides = ["method=fedbitfit", "adapter.targets=query"]
    assert load_config(None, overrides).adapter.targets == ("query",)


def test_bitfit_trains_a_vector_for_every_linear_map_and_nothing_else(
    tiny_overrides: list[str],
) -> None:
    overrides = [override for override in tiny_overrides if not override.startswith("dropout.")]
    config = load_config(None, [*overrides, "method=fedbitfit"])
    prepared = prepare(config, lambda step: None, "00c0ffee")
    layer = prepared.state.model.tensors[0]
    assert len(layer) == 6  # query, key, value, output, and the two of the feed-forward
    assert all(array.size == max(array.shape) for array in layer.values())
