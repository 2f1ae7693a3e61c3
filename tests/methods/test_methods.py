"""The contract of every federated method, and what is particular to each."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.messages import HEAD, Failure, Instruction, ServerState, Update, flatten
from droppeft.methods import METHODS, Method, Setup, method_named
from droppeft.runs.checkpoints import Checkpoint, load_newest, save
from droppeft.server.prepare import prepare
from droppeft.server.rounds import run_round
from droppeft.server.run import start_run
from handmade import LAYERS, Scripted, answer_to, assert_same, filled, setup_for
from runs import Recorder

# Settings with which a method's contract is tested: adding a method adds a row.
ROWS: dict[str, tuple[str, ...]] = {
    "droppeft": ("dropout.mean=0.25",),
    "adaptive": (),
    "fedlora": (),
    "fedadapter": ("cohort_size=3",),
    "fedadaopt": (),
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
    "fedadaopt": LONGER,
    "ffa_lora": LONGER,
    "fedia3": ("training.local_steps=60", "training.learning_rate=0.2"),
}
WITH_BASE_DELTA = {"flora", "fedex_lora"}
# An arm that a client was given counts as tried, whatever came of it.
BANDITS = {"adaptive"}
# What random weights make of a text cannot be steered by these.
WEAK = {"fedprompt", "fedptuning", "fedprefix", "fedbitfit"}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


@pytest.fixture
def setup(method: Method) -> Setup:
    return setup_for(f"method={method.name}", *ROWS[method.name])


def lessons(instruction: Instruction) -> list[Update]:
    """Answers whose sum in floating point depends on the order of its terms."""
    # (1e30 - 1e30) + 1 = 1, but (1 - 1e30) + 1e30 = 0
    return [answer_to(instruction, (1e30, -1e30, 1.0)[instruction.client % 3])]


def test_every_method_has_a_row_and_its_own_name() -> None:
    assert ROWS.keys() == METHODS.keys()
    assert all(method.name == name and method.summary for name, method in METHODS.items())


def test_instructions_answer_to_the_cohort_in_its_order(method: Method, setup: Setup) -> None:
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


def test_a_instruction_can_be_carried_out(method: Method, setup: Setup) -> None:
    for instruction in method.instruct(setup, method.init(setup), 1, [0, 5]):
        assert instruction.share or not method.has_global_model(setup.config)
        assert instruction.share <= {name for _, name, _ in flatten(instruction.tensors)}
        assert len(instruction.adapter.layers) == LAYERS
        assert instruction.seed == setup.config.seed
        assert (instruction.budget.steps is None) != (instruction.budget.epochs is None)
        assert instruction.dropout is None or len(instruction.dropout.rates) == LAYERS


def test_merging_nothing_changes_nothing(method: Method, setup: Setup) -> None:
    state = method.init(setup)
    instructions = method.instruct(setup, state, 1, [0, 1])
    failed = [Failure(instruction.client, "sent no reply") for instruction in instructions]
    merged = method.merge(setup, state, instructions, failed)
    assert_same(merged.model.tensors, state.model.tensors)
    memory = state.memory if method.name in BANDITS else merged.memory
    assert replace(merged, model=state.model, memory=memory) == state


def test_merging_makes_the_model_what_was_sent(method: Method, setup: Setup) -> None:
    """Some methods ask for some layers, or compare models for some rounds: what was asked for."""
    state = method.init(setup)
    asked: set[str] = set()
    for round in (1, 2, 3):
        instructions = method.instruct(setup, state, round, [0, 1, 2])
        asked |= {name for instruction in instructions for name in instruction.share}
        updates = [answer_to(instruction, 5.0) for instruction in instructions]
        state = method.merge(setup, state, instructions, updates)
    values = {name: set(array.tolist()) for _, name, array in flatten(state.model.tensors)}
    assert values == {name: {5.0} if name in asked else {1.0} for name in values}
    assert ("head.W" in asked) == (method.name != "local")


def test_the_order_of_arrival_does_not_matter(method: Method) -> None:
    setup = setup_for(f"method={method.name}", "clients=3", *ROWS[method.name])

    def play(backwards: bool) -> ServerState:
        state = method.init(setup)
        for round in (1, 2):
            transport = Scripted(lessons, backwards=backwards)
            state, _ = run_round(setup, method, transport, state, round, lambda reply: None)
        return state

    assert_same(play(backwards=False).model.tensors, play(backwards=True).model.tensors)


def test_state_survives_a_checkpoint(method: Method, setup: Setup, tmp_path: Path) -> None:
    state = method.init(setup)
    state, _ = run_round(setup, method, Scripted(lessons), state, 1, lambda reply: None)
    save(tmp_path, Checkpoint(1, state, {}))
    loaded = load_newest(tmp_path, method.memory_type).state
    assert_same(loaded.model.tensors, state.model.tensors)
    assert loaded.model.adapter == state.model.adapter
    assert loaded.memory == state.memory
    assert loaded.alternatives.keys() == state.alternatives.keys()
    for name, other in loaded.alternatives.items():
        assert other.adapter == state.alternatives[name].adapter
        assert_same(other.tensors, state.alternatives[name].tensors)
    assert method.evaluate_client(setup, loaded, 2, 0).measure
    plain = method.instruct(setup, state, 2, [0])[0]
    reloaded = method.instruct(setup, loaded, 2, [0])[0]
    assert (plain.adapter, plain.share, plain.dropout) == (
        reloaded.adapter,
        reloaded.share,
        reloaded.dropout,
    )


def moved_beside_the_head(method: Method, words: list[str], out: Path) -> bool:
    """Whether every tensor of the adapter itself has changed since the start."""
    first = prepare(load_config(None, words), lambda step: None).state.model.tensors
    last = load_newest(out / "checkpoints", method.memory_type).state.model.tensors
    return not any(
        np.array_equal(array, first[key][name]) for key, name, array in flatten(last) if key != HEAD
    )


def test_a_whole_run_learns_and_leaves_its_files(
    method: Method, tiny_words: list[str], tmp_path: Path
) -> None:
    without_tables = [word for word in tiny_words if not word.startswith("dropout.")]
    words = [
        *without_tables,
        f"method={method.name}",
        "training.local_steps=20",
        "training.batch_size=16",
        "training.learning_rate=0.02",
        "partition.kind=iid",
        *ROWS[method.name],
        *LEARNING.get(method.name, ()),
    ]
    result = start_run(load_config(None, words), tmp_path / "run", Recorder())
    # Three classes in equal parts: chance is a third.
    assert result["initial_accuracy"] < 0.5
    assert result["personalised_devices"] == result["clients"]
    files = {"checkpoints", "config.toml", "clients.jsonl", "result.json", "rounds.jsonl"}
    if method.has_global_model(load_config(None, words)):
        if method.name in WEAK:
            assert moved_beside_the_head(method, words, tmp_path / "run")
        else:
            assert result["global_accuracy"] > 0.6
        if method.name not in WITH_BASE_DELTA:
            files.add("adapter")
    assert {path.name for path in (tmp_path / "run").iterdir()} == files


def test_an_unknown_method_is_named_with_those_there_are() -> None:
    with pytest.raises(
        DroppeftError, match="method=fedfoo: unknown method; known are droppeft, ad"
    ):
        method_named("fedfoo")


# FedLoRA


def test_fedlora_weights_by_rows() -> None:
    setup, method = setup_for("method=fedlora"), METHODS["fedlora"]
    state = method.init(setup)
    one, other = method.instruct(setup, state, 1, [0, 1])
    updates = [answer_to(one, 1.0, examples=10), answer_to(other, 4.0, examples=20)]
    # (10 · 1 + 20 · 4) / 30 = 3
    assert_same(method.merge(setup, state, [one, other], updates).model.tensors, filled(3.0))


def test_fedlora_never_drops() -> None:
    setup, method = setup_for("method=fedlora"), METHODS["fedlora"]
    assert [
        instruction.dropout for instruction in method.instruct(setup, method.init(setup), 1, [0, 1])
    ] == [None] * 2


# DropPEFT


def test_droppeft_averages_a_layer_over_those_who_ran_it() -> None:
    setup, method = setup_for(), METHODS["droppeft"]
    state = method.init(setup)
    one, other = method.instruct(setup, state, 1, [0, 1])
    whole = answer_to(other, 4.0, examples=30)
    part = answer_to(one, 2.0, examples=10)
    part = replace(part, tensors={key: v for key, v in part.tensors.items() if key not in (1, 2)})
    rest = replace(whole, tensors={key: v for key, v in whole.tensors.items() if key != 2})
    merged = method.merge(setup, state, [one, other], [part, rest]).model.tensors
    # Layer 0: (10 · 2 + 30 · 4) / 40 = 3.5; layer 1: only 4; layer 2: nobody, so 1 as before.
    values = [float(next(iter(merged[layer].values()))[0]) for layer in range(LAYERS)]
    assert values == [3.5, 4.0, 1.0, 3.5]


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        (["dropout.mean=0.25"], (0.0, 0.5, 0.5, 0.0)),
        (["dropout.count=2"], (0.0, 1.0, 1.0, 0.0)),
        (["dropout.count=1", "dropout.protect_first=0"], (1 / 3, 1 / 3, 1 / 3, 0.0)),
        (["dropout.rates=[0.1, 0.2, 0.3, 0.4]"], (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_droppeft_instructions_the_configured_rates(
    words: list[str], rates: tuple[float, ...]
) -> None:
    setup, method = setup_for(*words, "dropout.sampling=bernoulli"), METHODS["droppeft"]
    for instruction in method.instruct(setup, method.init(setup), 1, [0, 1]):
        assert instruction.dropout is not None
        assert instruction.dropout.rates == pytest.approx(rates)
        assert instruction.dropout.sampling == "bernoulli"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dropout.mean=0.6"], "largest possible mean is 0.5"),
        (["dropout.count=3"], "dropout.count=3 is impossible: 4 layers of which 2 are protected"),
        (["dropout.rates=[0.5, 0.5]"], "2 drop rates were given for 4 layers"),
        (["dropout.protect_first=4"], "cannot protect 4 first and 1 last"),
    ],
)
def test_impossible_dropout_stops_before_anything_is_written(
    words: list[str], message: str, tiny_words: list[str], tmp_path: Path
) -> None:
    typical = [word for word in tiny_words if not word.startswith("dropout.")]
    with pytest.raises(DroppeftError, match=message):
        METHODS["droppeft"].init(setup_for(*words))
    with pytest.raises(DroppeftError, match=message):
        start_run(load_config(None, [*typical, *words]), tmp_path / "run", Recorder())
    assert list(tmp_path.iterdir()) == []


def test_an_exact_count_runs_the_same_depth_in_every_step(
    tiny_words: list[str], tmp_path: Path
) -> None:
    words = [*tiny_words[:-1], "dropout.count=2"]
    result = start_run(load_config(None, words), tmp_path / "run", Recorder())
    assert result["mean_active_layers"] == 2.0


# Rates of droppeft over a run


@pytest.mark.parametrize(
    ("words", "means"),
    [
        ((), [0.25] * 10),
        # Grows over the first three of ten rounds, from nothing.
        (("dropout.schedule=warm_up",), [0.0, 0.25 / 3, 0.5 / 3, *[0.25] * 7]),
        # The last three of ten rounds run at full depth.
        (("dropout.schedule=recovery",), [*[0.25] * 7, 0.0, 0.0, 0.0]),
        (("dropout.schedule=recovery", "dropout.schedule_part=0.1"), [*[0.25] * 9, 0.0]),
    ],
)
def test_rates_follow_their_schedule(words: tuple[str, ...], means: list[float]) -> None:
    setup = setup_for("method=droppeft", "rounds=10", "dropout.mean=0.25", *words)
    method = METHODS["droppeft"]
    state = method.init(setup)
    instructions = [method.instruct(setup, state, round, [1])[0] for round in range(1, 11)]
    found = [
        sum(instruction.dropout.rates) / 4 for instruction in instructions if instruction.dropout
    ]
    assert found == pytest.approx(means)


@pytest.mark.parametrize(("word", "every"), [("1", 1), ("5", 5), ("round", None)])
def test_a_draw_holds_as_the_configuration_says(word: str, every: int | None) -> None:
    setup = setup_for("method=droppeft", "dropout.mean=0.25", f"dropout.every={word}")
    method = METHODS["droppeft"]
    [instruction] = method.instruct(setup, method.init(setup), 1, [1])
    assert instruction.dropout is not None
    assert instruction.dropout.every == every
