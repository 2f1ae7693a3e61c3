"""The tests that every federated method must pass, and tests of FedLoRA and DropPEFT."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Update
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import HEAD, flatten
from droppeft.methods import METHODS, Method, Setup, method_named
from droppeft.methods.rules import check_settings
from droppeft.runs.checkpoints import Checkpoint, load_newest, save
from droppeft.server.prepare import prepare
from droppeft.server.rounds import draw_cohort, run_round
from droppeft.server.run import start_run
from handmade import LAYERS, Scripted, assert_same, filled, setup_for, shaped, update_for
from runs import Recorder

# Settings with which each method is tested; a new method needs a row.
ROWS: dict[str, tuple[str, ...]] = {
    "droppeft": ("dropout.mean=0.25",),
    "adaptive": (),
    "fedlora": (),
    "fedadapter": ("cohort_size=3",),
    "fedhetlora": (),
    "fedra": ("dropout.mean=0.25",),
    "legend": (),
    "ffa_lora": (),
    "flexlora": (),
    "flora": (),
    "fedex_lora": (),
    "fedsa_lora": (),
    "fedprompt": (),
    "fedptuning": (),
    "fedprefix": (),
    "fedia3": (),
    "fedbitfit": (),
    "ditto": (),
    "local": (),
    "centralised": (),
}
# A bottleneck of 8 in two layers of random weights learns slowly.
LONGER = ("training.local_steps=60", "training.learning_rate=0.05")
LEARNING = {
    "fedadapter": LONGER,
    "ffa_lora": LONGER,
    "fedsa_lora": LONGER,
    "fedia3": ("training.local_steps=60", "training.learning_rate=0.2"),
}
WITH_BASE_DELTA = {"flora", "fedex_lora"}
# Their memory changes without updates: an arm that was given to a client counts as tried.
BANDITS = {"adaptive"}
ROBUST = ("median", "trimmed_mean", "krum", "multi_krum")
# Merge rules with which a method cannot work.
REFUSED = {
    *((method, rule) for method in ("local", "centralised", "fedadapter") for rule in ROBUST),
    *((name, rule) for name in ("adaptive", "fedhetlora", "flexlora") for rule in ROBUST[:2]),
}
# With a backbone of random weights these adapters are too weak to learn the task.
WEAK = {"fedprompt", "fedptuning", "fedprefix", "fedbitfit"}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


@pytest.fixture
def setup(method: Method) -> Setup:
    return setup_for(f"method={method.name}", *ROWS[method.name])


def order_sensitive(instruction: Instruction) -> list[Update]:
    """Updates whose sum in floating point depends on the order of its terms."""
    # (1e30 - 1e30) + 1 = 1, but (1 - 1e30) + 1e30 = 0
    return [update_for(instruction, (1e30, -1e30, 1.0)[instruction.client % 3])]


def test_every_method_has_a_row_and_its_name() -> None:
    assert ROWS.keys() == METHODS.keys()
    assert all(method.name == name and method.summary for name, method in METHODS.items())


def test_instructions_are_in_the_order_of_the_cohort(method: Method, setup: Setup) -> None:
    state = method.init(setup)
    assert isinstance(state, ServerState)
    assert type(state.memory) is method.memory_type
    instructions = method.instruct(setup, state, 2, [7, 1, 4])
    assert [(instruction.round, instruction.client) for instruction in instructions] == [
        (2, 7),
        (2, 1),
        (2, 4),
    ]
    again = method.instruct(setup, state, 2, [7, 1, 4])
    nonces = [instruction.nonce for instruction in (*instructions, *again)]
    assert len(set(nonces)) == 6
    assert min(map(len, nonces)) >= 32


def test_an_instruction_is_consistent(method: Method, setup: Setup) -> None:
    for instruction in method.instruct(setup, method.init(setup), 1, [0, 5]):
        assert instruction.share or not method.has_global_model(setup.config)
        assert instruction.share <= {name for _, name, _ in flatten(instruction.tensors)}
        assert len(instruction.adapter.layers) == LAYERS
        assert instruction.seed == setup.config.seed
        assert (instruction.budget.steps is None) != (instruction.budget.epochs is None)
        assert instruction.dropout is None or len(instruction.dropout.rates) == LAYERS


def test_merging_failures_changes_nothing(method: Method, setup: Setup) -> None:
    state = method.init(setup)
    instructions = method.instruct(setup, state, 1, [0, 1])
    failed = [Failure(instruction.client, "sent no reply") for instruction in instructions]
    merged = method.merge(setup, state, instructions, failed)
    assert_same(merged.model.tensors, state.model.tensors)
    memory = state.memory if method.name in BANDITS else merged.memory
    assert replace(merged, model=state.model, memory=memory) == state


def test_merging_equal_updates_gives_their_value(method: Method, setup: Setup) -> None:
    """Only tensors that some instruction asked for change, which may take several rounds."""
    state = method.init(setup)
    asked: set[str] = set()
    for round in (1, 2, 3):
        instructions = method.instruct(setup, state, round, [0, 1, 2])
        asked |= {name for instruction in instructions for name in instruction.share}
        updates = [update_for(instruction, 5.0) for instruction in instructions]
        state = method.merge(setup, state, instructions, updates)
    values = {name: set(array.tolist()) for _, name, array in flatten(state.model.tensors)}
    assert values == {name: {5.0} if name in asked else {1.0} for name in values}
    assert ("head.W" in asked) == (method.name != "local")


def test_the_order_of_arrival_does_not_matter(method: Method) -> None:
    setup = setup_for(f"method={method.name}", "clients=3", *ROWS[method.name])

    def state_after(backwards: bool) -> ServerState:
        state = method.init(setup)
        for round in (1, 2):
            transport = Scripted(order_sensitive, backwards=backwards)
            state, _ = run_round(setup, method, transport, state, round, lambda reply: None)
        return state

    first, second = state_after(backwards=False), state_after(backwards=True)
    assert_same(first.model.tensors, second.model.tensors)


@pytest.mark.parametrize("rule", ["mean", *ROBUST])
def test_a_huge_update_is_bounded_under_every_rule_or_the_rule_is_refused(
    method: Method, rule: str
) -> None:
    """In two rounds, four clients change their values by about 0.1, and one by a million."""
    words = (f"method={method.name}", *ROWS[method.name], "cohort_size=5", f"server.merge={rule}")
    setup = setup_for(*words)
    if (method.name, rule) in REFUSED:
        with pytest.raises(DroppeftError, match=r"server\.merge"):
            check_settings(setup.config)
        return
    check_settings(setup.config)
    if setup.config.adapter.rank or setup.config.adapter.width:
        setup = shaped(*words)

    def answer(instruction: Instruction) -> list[Update]:
        attacks = instruction.client == max(draw_cohort(setup, instruction.round))
        change = np.float32(1e6 if attacks else 0.1 + instruction.client / 1000)
        update = update_for(instruction)
        tensors = {
            key: {name: instruction.tensors[key][name] + change for name in named}
            for key, named in update.tensors.items()
        }
        return [replace(update, tensors=tensors)]

    state = first = method.init(setup)
    for round in (1, 2):
        state, closed = run_round(setup, method, Scripted(answer), state, round, lambda reply: None)
        assert closed.accepted
    for key, name, value in flatten(state.model.tensors):
        np.testing.assert_allclose(value, first.model.tensors[key][name], atol=5.0)
    delta = state.model.base_delta
    for value in delta.tensors.values() if delta else ():
        np.testing.assert_allclose(value, 0.0, atol=20.0)


def test_state_survives_a_checkpoint(method: Method, setup: Setup, tmp_path: Path) -> None:
    state = method.init(setup)
    state, _ = run_round(setup, method, Scripted(order_sensitive), state, 1, lambda reply: None)
    save(tmp_path, Checkpoint(1, state, {}))
    loaded = load_newest(tmp_path, method.memory_type).state
    assert_same(loaded.model.tensors, state.model.tensors)
    assert loaded.model.adapter == state.model.adapter
    assert loaded.memory == state.memory
    assert loaded.alternatives.keys() == state.alternatives.keys()
    for name, other in loaded.alternatives.items():
        assert other.adapter == state.alternatives[name].adapter
        assert_same(other.tensors, state.alternatives[name].tensors)
    assert method.evaluate_client(setup, loaded, 2, 0).evaluate_only
    plain = method.instruct(setup, state, 2, [0])[0]
    reloaded = method.instruct(setup, loaded, 2, [0])[0]
    assert (plain.adapter, plain.share, plain.dropout) == (
        reloaded.adapter,
        reloaded.share,
        reloaded.dropout,
    )


def adapter_changed(method: Method, overrides: list[str], out: Path) -> bool:
    """Whether every tensor of the adapter, without the head, has changed since the start."""
    first = prepare(load_config(None, overrides), lambda step: None).state.model.tensors
    last = load_newest(out / "checkpoints", method.memory_type).state.model.tensors
    return not any(
        np.array_equal(array, first[key][name]) for key, name, array in flatten(last) if key != HEAD
    )


@pytest.mark.sample("adaptive", "local")
def test_a_whole_run_learns_and_writes_its_files(
    method: Method, tiny_overrides: list[str], tmp_path: Path
) -> None:
    other = [override for override in tiny_overrides if not override.startswith("dropout.")]
    overrides = [
        *other,
        f"method={method.name}",
        "training.local_steps=20",
        "training.batch_size=16",
        "training.learning_rate=0.02",
        "partition.kind=iid",
        *ROWS[method.name],
        *LEARNING.get(method.name, ()),
    ]
    result = start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    # Three classes in equal parts: chance is a third.
    assert result["initial_accuracy"] < 0.5
    assert result["personalised_clients"] == result["clients"]
    files = {".lock", "checkpoints", "config.toml", "clients.jsonl", "result.json", "rounds.jsonl"}
    if method.has_global_model(load_config(None, overrides)):
        if method.name in WEAK:
            assert adapter_changed(method, overrides, tmp_path / "run")
        else:
            assert result["global_accuracy"] > 0.6
        if method.name not in WITH_BASE_DELTA:
            files.add("adapter")
    else:
        assert result["personalised_accuracy_trained"] > 0.6
    assert {path.name for path in (tmp_path / "run").iterdir()} == files


def test_the_error_for_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(
        DroppeftError, match="method=fedfoo: unknown method; known are droppeft, ad"
    ):
        method_named("fedfoo")


# FedLoRA


def test_fedlora_weights_by_rows() -> None:
    setup, method = setup_for("method=fedlora"), METHODS["fedlora"]
    state = method.init(setup)
    one, other = method.instruct(setup, state, 1, [0, 1])
    updates = [update_for(one, 1.0, examples=10), update_for(other, 4.0, examples=20)]
    # (10 · 1 + 20 · 4) / 30 = 3
    assert_same(method.merge(setup, state, [one, other], updates).model.tensors, filled(3.0))


def test_fedlora_has_no_layer_dropout() -> None:
    setup, method = setup_for("method=fedlora"), METHODS["fedlora"]
    assert [
        instruction.dropout for instruction in method.instruct(setup, method.init(setup), 1, [0, 1])
    ] == [None] * 2


# DropPEFT


def test_droppeft_averages_a_layer_over_the_clients_that_sent_it() -> None:
    setup, method = setup_for(), METHODS["droppeft"]
    state = method.init(setup)
    one, other = method.instruct(setup, state, 1, [0, 1])
    whole = update_for(other, 4.0, examples=30)
    part = update_for(one, 2.0, examples=10)
    part = replace(part, tensors={key: v for key, v in part.tensors.items() if key not in (1, 2)})
    rest = replace(whole, tensors={key: v for key, v in whole.tensors.items() if key != 2})
    merged = method.merge(setup, state, [one, other], [part, rest]).model.tensors
    # Layer 0: (10 · 2 + 30 · 4) / 40 = 3.5; layer 1: 4 of one client; layer 2: no client, so 1.
    values = [float(next(iter(merged[layer].values()))[0]) for layer in range(LAYERS)]
    assert values == [3.5, 4.0, 1.0, 3.5]


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        (["dropout.mean=0.25"], (0.0, 0.5, 0.5, 0.0)),
        (["dropout.count=2"], (0.0, 1.0, 1.0, 0.0)),
        (["dropout.count=1", "dropout.protect_first=0"], (1 / 3, 1 / 3, 1 / 3, 0.0)),
        (["dropout.rates=[0.1, 0.2, 0.3, 0.4]"], (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_droppeft_instructs_the_configured_rates(
    overrides: list[str], rates: tuple[float, ...]
) -> None:
    setup, method = setup_for(*overrides, "dropout.sampling=bernoulli"), METHODS["droppeft"]
    for instruction in method.instruct(setup, method.init(setup), 1, [0, 1]):
        assert instruction.dropout is not None
        assert instruction.dropout.rates == pytest.approx(rates)
        assert instruction.dropout.sampling == "bernoulli"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dropout.mean=0.6"], "largest possible mean is 0.5"),
        (
            ["dropout.count=3"],
            "dropout.count=3 is impossible: 2 of 4 layers are protected; set at most 2",
        ),
        (["dropout.rates=[0.5, 0.5]"], "2 drop rates were given for 4 layers"),
        (["dropout.protect_first=4"], "cannot protect 4 first and 1 last"),
    ],
)
def test_impossible_dropout_is_refused_before_anything_is_written(
    overrides: list[str], message: str, tiny_overrides: list[str], tmp_path: Path
) -> None:
    other = [override for override in tiny_overrides if not override.startswith("dropout.")]
    with pytest.raises(DroppeftError, match=message):
        METHODS["droppeft"].init(setup_for(*overrides))
    with pytest.raises(DroppeftError, match=message):
        start_run(load_config(None, [*other, *overrides]), tmp_path / "run", Recorder())
    assert list(tmp_path.iterdir()) == []


def test_an_exact_count_runs_the_same_depth_in_every_step(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_overrides[:-1], "dropout.count=2"]
    result = start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    assert result["mean_active_layers"] == 2.0


# Schedules of DropPEFT's rates


@pytest.mark.parametrize(
    ("overrides", "means"),
    [
        ((), [0.25] * 10),
        # Rates grow from 0 over the first three of ten rounds.
        (("dropout.schedule=warm_up",), [0.0, 0.25 / 3, 0.5 / 3, *[0.25] * 7]),
        # The last three of ten rounds run at full depth.
        (("dropout.schedule=recovery",), [*[0.25] * 7, 0.0, 0.0, 0.0]),
    ],
)
def test_rates_follow_their_schedule(overrides: tuple[str, ...], means: list[float]) -> None:
    setup = setup_for("method=droppeft", "rounds=10", "dropout.mean=0.25", *overrides)
    method = METHODS["droppeft"]
    state = method.init(setup)
    instructions = [method.instruct(setup, state, round, [1])[0] for round in range(1, 11)]
    found = [
        sum(instruction.dropout.rates) / 4 for instruction in instructions if instruction.dropout
    ]
    assert found == pytest.approx(means)


@pytest.mark.parametrize(("override", "every"), [("1", 1), ("5", 5), ("round", None)])
def test_a_draw_of_gates_holds_for_the_configured_steps(override: str, every: int | None) -> None:
    setup = setup_for("method=droppeft", "dropout.mean=0.25", f"dropout.every={override}")
    method = METHODS["droppeft"]
    [instruction] = method.instruct(setup, method.init(setup), 1, [1])
    assert instruction.dropout is not None
    assert instruction.dropout.every == every
