"""The bandit in rounds and runs: instructions of arms, modelled seconds, and learning."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from droppeft.bandit import POLICIES, Arm, arm_costs, federated
from droppeft.bandit.bandit_memory import BanditMemory
from droppeft.config import DeviceProfile, load_config, resolve
from droppeft.costs.device_profiles import PROFILES, make_fleet, seconds_per_byte
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction, first_trained_layer
from droppeft.messages.reply import Failure, Update
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import HEAD, flatten, payload_bytes
from droppeft.methods import METHODS, Setup
from droppeft.methods.droppeft import DropPEFTMemory, configured_rates
from droppeft.runs.method_memory import decode_memory, encode_memory
from droppeft.server.resume import resume_run
from droppeft.server.round_cost import make_clock
from droppeft.server.rounds import run_round
from droppeft.server.run import start_run
from droppeft.sharing.expected_costs import typical_bytes
from handmade import (
    ARITHMETIC,
    BACKWARD,
    FORWARD,
    LAYERS,
    REST,
    Scripted,
    instruction_for,
    setup_for,
    update_for,
)
from runs import Recorder, outcome, rows_of, stop_after_a_round

DROPPEFT = METHODS["droppeft"]
THOMPSON = "configurator.policy=budgeted_thompson"
MEASURED = "configurator.reward=loss"
UNPROTECTED = ("dropout.protect_first=0", "dropout.protect_last=0")


def setup(*overrides: str) -> Setup:
    return setup_for(THOMPSON, MEASURED, *UNPROTECTED, "rounds=40", *overrides)


def arms_of(setup: Setup, state: ServerState, round: int, cohort: list[int]) -> list[Arm]:
    arms = memory_of(state).arms
    return [arms[number] for number in numbers_of(setup, state, round, cohort)]


def numbers_of(setup: Setup, state: ServerState, round: int, cohort: list[int]) -> list[int]:
    return federated.arms_of_round(setup, state.model, memory_of(state), round, cohort)


def memory_of(state: ServerState) -> BanditMemory:
    memory: DropPEFTMemory = state.memory
    assert memory.bandit is not None
    return memory.bandit


def learnt(setup: Setup) -> ServerState:
    """The state after two rounds in which every arm was tried, with uninformative rewards."""
    state = DROPPEFT.init(setup)
    for round in (1, 2):
        instructions = DROPPEFT.instruct(setup, state, round, list(range(6)))
        rewards = [
            update_for(instruction, reward=0.1 * (instruction.client % 3))
            for instruction in instructions
        ]
        state = as_saved(DROPPEFT.merge(setup, state, instructions, rewards))
    return state


def as_saved(state: ServerState) -> ServerState:
    values = json.loads(json.dumps(encode_memory(state.memory)))
    return replace(state, memory=decode_memory(values, DropPEFTMemory))


def untrained(arm: Arm) -> float:
    """The share of layers that no step of an arm trains."""
    return 1 - max(arm.depths)


# Instructions


def test_a_fixed_policy_uses_the_configured_rates() -> None:
    fixed = setup_for("dropout.mean=0.25")
    state = DROPPEFT.init(fixed)
    assert state.memory == DropPEFTMemory()
    for instruction in DROPPEFT.instruct(fixed, state, 1, [0, 1]):
        assert instruction.dropout is not None
        assert instruction.dropout.rates == configured_rates(fixed.config.dropout, LAYERS)
        assert (instruction.train, instruction.reward_rows) == (None, 0)
    assert DROPPEFT.note(fixed, state) is None


def test_an_instruction_drops_and_trains_what_its_arm_says() -> None:
    run_setup = setup()
    state = learnt(run_setup)
    seen = set()
    for round in range(3, 20):
        cohort = [0, 3, 7]
        instructions = DROPPEFT.instruct(run_setup, state, round, cohort)
        for instruction, arm in zip(
            instructions, arms_of(run_setup, state, round, cohort), strict=True
        ):
            lower = 2 if untrained(arm) else 0
            seen.add(arm)
            assert instruction.dropout is not None
            assert sum(instruction.dropout.rates[lower:]) == pytest.approx(
                arm.mean * (LAYERS - lower)
            )
            assert not any(instruction.dropout.rates[:lower])
            assert first_trained_layer(instruction) == lower
            assert instruction.reward_rows == 16
            assert len(instruction.tensors) == LAYERS + 1  # the client gets all values
            if lower:
                assert (
                    instruction.train == instruction.share == {"head.W", "layer.2.A", "layer.3.A"}
                )
    assert len(seen) > 3


def test_the_same_state_round_and_cohort_give_the_same_arms() -> None:
    run_setup = setup()
    state = learnt(run_setup)
    first = arms_of(run_setup, state, 1, [1, 2, 3])
    assert arms_of(run_setup, as_saved(state), 1, [1, 2, 3]) == first
    several = [arms_of(run_setup, state, round, [1, 2, 3]) for round in range(1, 9)]
    assert len(set(map(tuple, several))) > 2
    other = setup("seed=1")
    assert [arms_of(other, state, round, [1, 2, 3]) for round in range(1, 9)] != several


def test_the_random_policy_measures_no_rewards() -> None:
    run_setup = setup_for("configurator.policy=uniform_random", *UNPROTECTED)
    state = DROPPEFT.init(run_setup)
    instructions = DROPPEFT.instruct(run_setup, state, 1, [0, 1, 2])
    assert {instruction.reward_rows for instruction in instructions} == {0}


# What is learnt


def test_a_reward_counts_for_the_arm_of_its_client() -> None:
    run_setup = setup()
    state = DROPPEFT.init(run_setup)
    cohort = [0, 1, 2, 3, 4]
    instructions = DROPPEFT.instruct(run_setup, state, 1, cohort)
    rewards = [0.1, None, 0.3, 0.4, 0.5]
    replies = [
        update_for(instruction, reward=reward)
        for instruction, reward in zip(instructions, rewards, strict=True)
    ]
    replies[2] = Failure(2, "asleep")  # type: ignore[call-overload]
    after = as_saved(DROPPEFT.merge(run_setup, state, instructions, replies))
    numbers = numbers_of(run_setup, state, 1, cohort)
    observations = memory_of(after).observations
    assert [(each.arm, each.reward) for each in observations] == [
        (numbers[0], 0.1),
        (numbers[3], 0.4),
        (numbers[4], 0.5),
    ]
    note = DROPPEFT.note(run_setup, after)
    assert note is not None
    assert note["chosen"] == {str(client): number for client, number in enumerate(numbers)}
    assert sum(note["trials"]) == 3
    assert set(note["labels"]) == {str(number) for number in note["present"]}


def test_a_round_of_failures_teaches_nothing() -> None:
    run_setup = setup()
    state = DROPPEFT.init(run_setup)
    instructions = DROPPEFT.instruct(run_setup, state, 1, [0, 1])
    after = DROPPEFT.merge(
        run_setup,
        state,
        instructions,
        [Failure(instruction.client, "x") for instruction in instructions],
    )
    known, before = memory_of(after), memory_of(state)
    assert replace(known, tried=before.tried) == before
    assert known.tried == {*numbers_of(run_setup, state, 1, [0, 1])}


# Modelled costs of arms


@pytest.mark.parametrize(
    "sharing", [(), ("sharing.fraction=0.5", "configurator.depths=[[1],[0.75],[0.25]]")]
)
def test_expected_seconds_are_those_of_the_modelled_clock(sharing: tuple[str, ...]) -> None:
    """Ten steps of 16 rows; rows and gates of the expected local training are the mean ones.

    Half of the layers that an arm trains are uploaded, rounded up; here the lowest ones.
    """
    run_setup = setup("training.local_steps=10", "clock.profiles=laptop_cpu", *sharing)
    state = DROPPEFT.init(run_setup)
    memory = replace(memory_of(state), row_length=8.0)
    assert run_setup.clock is not None
    for arm in memory.arms.values():
        instruction = _instruction_of(run_setup, state, arm)
        lower = first_trained_layer(instruction)
        rates = instruction.dropout.rates if instruction.dropout else ()
        tokens = 10 * 16 * 8
        update = _update_of(instruction, tokens, [round(tokens * (1 - rate)) for rate in rates])
        if sharing:
            shared = range(lower, lower + (LAYERS - lower + 1) // 2)
            sent = {key: instruction.tensors[key] for key in (*shared, HEAD)}
            update = replace(update, tensors=sent)
        charged = run_setup.clock.client_cost(instruction, update)
        profile = run_setup.clock.fleet.profile(0)
        expected = arm_costs.local_training_seconds(run_setup, state.model, 8.0, arm, profile)
        # A first instruction brings all layers; later ones bring those that were shared.
        more = payload_bytes(instruction.tensors) - typical_bytes(
            run_setup.config, state.model.tensors
        )
        assert (more > 0) == bool(sharing)
        later = charged.total_s - more * seconds_per_byte(profile.download)
        assert expected == pytest.approx(later, rel=1e-10)
        # By hand, per token: forward in untrained layers; forward and backward in trained layers,
        # in the head and in the embeddings.
        active = sum(1 - rate for rate in rates[lower:])
        flops = tokens * (lower * FORWARD + active * (FORWARD + BACKWARD) + 2 * REST)
        assert charged.train_s == pytest.approx(flops / 3e11 + 10 * 0.02, rel=1e-6)


def _instruction_of(run_setup: Setup, state: ServerState, arm: Arm) -> Instruction:
    memory = replace(memory_of(state), arms={0: arm})
    only = replace(state, memory=replace(state.memory, bandit=memory))
    [instruction] = DROPPEFT.instruct(run_setup, only, 1, [0])
    return instruction


def _update_of(instruction: Instruction, tokens: int, layer_tokens: list[int]) -> Update:
    lower = first_trained_layer(instruction)
    update = update_for(
        instruction, reward=0.1, steps=10, active_steps=(10,) * LAYERS, examples=160
    )
    cost = replace(
        update.cost,
        tokens=tokens,
        rows=160,
        layer_tokens=(0,) * lower + tuple(layer_tokens[lower:]),
        forward_tokens=(*layer_tokens[:lower], *[0] * (LAYERS - lower)),
        reward_tokens=2 * instruction.reward_rows * tokens // 160,
    )
    return replace(update, cost=cost)


def with_memory_limits(*limits: float) -> Setup:
    """A setup with one device profile for each memory limit in bytes."""
    tables = {
        f"kind{place}": {
            "effective_flops_per_s": 1e12,
            "memory_bytes": limit,
            "idle_watts": 1.0,
            "train_watts": 1.0,
            "download": 1e6,
            "upload": 1e6,
        }
        for place, limit in enumerate(limits)
    }
    plain = setup()
    profiles = {name: DeviceProfile.model_validate(table) for name, table in tables.items()}
    clock = plain.config.clock.model_copy(update={"custom": profiles, "profiles": tuple(profiles)})
    config = plain.config.model_copy(update={"clock": clock})
    fleet = make_fleet(clock, config.clients, config.seed)
    # Each layer stores one megabyte of activations, all else nothing.
    counts = [
        replace(count, blocks=tuple(replace(block, stored_bytes=10**6) for block in count.blocks))
        for count in ARITHMETIC.counts
    ]
    stored = replace(ARITHMETIC, counts=tuple(counts))
    return replace(plain, config=config, clock=make_clock(fleet, lambda spec: stored))


PROCESS = 500_000_000


def test_an_arm_that_does_not_fit_is_never_given() -> None:
    """Two megabytes are enough for two of four layers at a time."""
    run_setup = with_memory_limits(PROCESS + 2.5e6, PROCESS + 1e9)
    state = DROPPEFT.init(run_setup)
    assert run_setup.clock is not None
    small = [client for client in range(10) if run_setup.clock.fleet.names[client] == "kind0"]
    assert len(small) == 5
    for policy in POLICIES:
        chosen = run_setup.config.configurator.model_copy(update={"policy": policy})
        other = replace(
            run_setup, config=run_setup.config.model_copy(update={"configurator": chosen})
        )
        for round in range(1, 15):
            for arm in arms_of(other, state, round, small):
                lower = 2 if untrained(arm) else 0
                assert (LAYERS - lower) * (1 - arm.mean) <= 2


def test_a_client_that_no_arm_fits_is_an_error() -> None:
    message = (
        "no arm of the configurator fits the memory of kind0: the smallest needs 0.50 GB of 0.50"
    )
    with pytest.raises(DroppeftError, match=message):
        DROPPEFT.init(with_memory_limits(PROCESS + 0.5e6))


def test_slower_clients_get_cheaper_arms() -> None:
    """After it was learnt that dropping costs little reward, the cohort finishes together."""
    run_setup = setup("clock.profiles=jetson_tx2,jetson_agx_xavier", "training.local_steps=100")
    state = DROPPEFT.init(run_setup)
    for round in range(1, 30):
        instructions = DROPPEFT.instruct(run_setup, state, round, list(range(10)))
        arms = arms_of(run_setup, state, round, list(range(10)))
        replies = [
            update_for(instruction, reward=1.0 - 0.2 * arm.mean - 0.1 * untrained(arm))
            for instruction, arm in zip(instructions, arms, strict=True)
        ]
        state = as_saved(DROPPEFT.merge(run_setup, state, instructions, replies))
    assert run_setup.clock is not None
    names = run_setup.clock.fleet.names
    last = arms_of(run_setup, state, 30, list(range(10)))
    work = {
        name: np.mean([1 - arm.mean for place, arm in enumerate(last) if names[place] == name])
        for name in ("jetson_tx2", "jetson_agx_xavier")
    }
    assert work["jetson_tx2"] < work["jetson_agx_xavier"]


def test_without_a_clock_there_is_no_bandit() -> None:
    with pytest.raises(DroppeftError, match=r"set method=fedlora, or configurator\.policy=fixed"):
        DROPPEFT.init(replace(setup(), clock=None))


def test_impossible_arms_are_an_error() -> None:
    with pytest.raises(DroppeftError, match="no arm of the configurator is possible"):
        DROPPEFT.init(setup_for(THOMPSON, "configurator.means=[0.9]", "configurator.depths=[[1]]"))


def test_an_arm_that_misses_the_deadline_is_not_given() -> None:
    """If a client has no arm that meets the deadline, it may have any."""
    overrides = ("clock.profiles=jetson_tx2,jetson_agx_xavier", "training.local_steps=100")
    plain = setup(*overrides)
    state = learnt(plain)
    memory = memory_of(state)
    assert plain.clock is not None
    fleet = plain.clock.fleet
    slow = next(client for client in range(10) if fleet.names[client] == "jetson_tx2")
    seconds = dict(
        zip(
            memory.arms.values(),
            arm_costs.seconds_of(plain, state.model, memory, fleet.profile(slow)),
            strict=True,
        )
    )
    middle = sorted(seconds.values())[2]
    tight = setup(*overrides, f"clock.deadline_s={middle + 1e-6}")
    for round in range(3, 20):
        [arm] = arms_of(tight, state, round, [slow])
        assert seconds[arm] <= middle
    never = setup(*overrides, "clock.deadline_s=0.001")
    assert arms_of(never, state, 3, [slow])


def test_prompts_have_no_untrained_layers() -> None:
    """They are inputs of the first layer, so that all layers need a backward pass."""
    run_setup = setup("adapter.type=prompt_tuning")
    arms = memory_of(DROPPEFT.init(run_setup)).arms.values()
    assert {untrained(arm) for arm in arms} == {0.0}
    instruction = instruction_for(0, train=frozenset({"prompt"}))
    prompt = {**instruction.tensors, "other": {"prompt": np.zeros(1, np.float32)}}
    assert first_trained_layer(replace(instruction, tensors=prompt)) == 0


def test_arms_that_fit_no_client_are_no_candidates() -> None:
    run_setup = with_memory_limits(PROCESS + 2.5e6)
    state = DROPPEFT.init(run_setup)
    for arm in memory_of(state).arms.values():
        assert (LAYERS - 2 * bool(untrained(arm))) * (1 - arm.mean) <= 2


def test_a_round_without_clients_leaves_no_note() -> None:
    run_setup = setup()
    state = learnt(run_setup)
    assert DROPPEFT.note(run_setup, state) is not None
    after = DROPPEFT.merge(run_setup, state, [], [])
    assert memory_of(after) == memory_of(state)
    assert DROPPEFT.note(run_setup, after) is None


def test_a_bandwidth_that_varies_takes_longer_than_its_mean() -> None:
    """Half of the draws of N(1, 2.25²) are clipped at 1 MB/s; the mean is found by sampling."""
    link = PROFILES["jetson_tx2"].upload
    drawn = np.random.default_rng(0).normal(link.mean, link.deviation, 200_000)
    expected = np.mean(1 / np.clip(drawn, link.least, link.most))
    assert seconds_per_byte(link) == pytest.approx(expected, rel=0.01)
    assert seconds_per_byte(PROFILES["laptop_cpu"].upload) == 1 / 2.5e6


@pytest.mark.parametrize(
    "override",
    ["configurator.depths=[[0]]", "configurator.means=[0, 50]", "configurator.means=[]"],
)
def test_shares_outside_their_range_are_refused(override: str) -> None:
    with pytest.raises(DroppeftError, match=r"configurator\.(means|depths)"):
        load_config(None, [override])


# Rounds and runs


def test_the_order_of_arrival_does_not_matter() -> None:
    run_setup = setup()

    def memory_after(*, backwards: bool) -> BanditMemory:
        state = DROPPEFT.init(run_setup)
        for round in range(1, 7):
            transport = Scripted(
                lambda instruction: [
                    update_for(instruction, reward=0.1 * (instruction.client % 4))
                ],
                backwards=backwards,
            )
            state, _ = run_round(run_setup, DROPPEFT, transport, state, round, lambda reply: None)
        return memory_of(state)

    memory = memory_after(backwards=False)
    assert len(memory.observations) > len(memory.arms)
    assert memory == memory_after(backwards=True)


@pytest.mark.sample("loss")
@pytest.mark.parametrize("reward", ["agreement", "loss"])
def test_a_resumed_run_continues_with_the_saved_memory(
    tiny_overrides: list[str], tmp_path: Path, reward: str
) -> None:
    other = [override for override in tiny_overrides if not override.startswith("dropout.")]
    overrides = [*other, THOMPSON, f"configurator.reward={reward}", *UNPROTECTED, "rounds=5"]
    start_run(load_config(None, overrides), tmp_path / "whole", Recorder())
    stop_after_a_round(overrides, tmp_path / "run")
    resume_run(tmp_path / "run", Recorder())
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    rows = rows_of(tmp_path / "whole" / "rounds.jsonl")
    assert all(
        row["notes"]["chosen"].keys() == {str(client) for client in row["cohort"]} for row in rows
    )
    assert all(0 <= row["idle_modelled_share"] < 1 for row in rows)
    clients = rows_of(tmp_path / "whole" / "clients.jsonl")
    measured = [row["reward"] is not None and row["reward_modelled_s"] > 0 for row in clients]
    assert set(measured) == {reward == "loss"}
    rewards = [reward for row in rows for reward in row["notes"]["rewards"].values()]
    assert None not in rewards
    assert len({*rewards}) > 1


@pytest.mark.sample("epsilon_greedy")
@pytest.mark.parametrize("policy", ["epsilon_greedy", "sliding_window_ucb", "uniform_random"])
def test_every_policy_completes_a_run(
    policy: str, tiny_overrides: list[str], tmp_path: Path
) -> None:
    other = [override for override in tiny_overrides if not override.startswith("dropout.")]
    overrides = [
        *other,
        f"configurator.policy={policy}",
        MEASURED,
        *UNPROTECTED,
    ]
    start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    clients = rows_of(tmp_path / "run" / "clients.jsonl")
    assert all((row["reward"] is None) == (policy == "uniform_random") for row in clients)


def test_an_untrained_layer_costs_its_forward_pass() -> None:
    """The modelled clock, for an instruction that trains the layers from 2 on."""
    names = frozenset({"head.W", "layer.2.A", "layer.3.A"})
    instruction = instruction_for(0, train=names, share=names)
    assert first_trained_layer(instruction) == 2
    assert first_trained_layer(instruction_for(0)) == 0
    assert first_trained_layer(replace(instruction, train=frozenset({"head.W"}))) == LAYERS
    config = resolve(load_config(None, ["clients=1", "cohort_size=1"]), cuda=False)
    clock = config.clock.model_copy(update={"profiles": ("laptop_cpu",)})
    fleet = make_fleet(clock, 1, 0)
    update = update_for(instruction, active_steps=(0, 0, 2, 2))
    tokens = {"layer_tokens": (0, 0, 64, 64), "forward_tokens": (64, 64, 0, 0)}
    update = replace(update, cost=replace(update.cost, **tokens))
    charged = make_clock(fleet, lambda spec: ARITHMETIC).client_cost(instruction, update).train_s
    flops = 64 * (2 * FORWARD + 2 * (FORWARD + BACKWARD) + 2 * REST)
    profile = PROFILES["laptop_cpu"]
    assert charged == pytest.approx(flops / profile.effective_flops_per_s + 2 * 0.02)
    assert [key for key, _, _ in flatten(update.tensors)] == [2, 3, "head"]


def test_values_of_layers_are_reported_once_a_round_told_them() -> None:
    """Frozen layers have none, and without common layers nothing is known."""
    setup = setup_for(*UNPROTECTED, "frozen.layers=1", "configurator.policy=layer_values", MEANS)
    state = DROPPEFT.init(setup)
    last = federated.ArmsOfRound(1, {0: 0}, {}, {0: None}, (0.0,) * LAYERS, (1.0,) * LAYERS)
    unknown = memory_of(state)
    assert federated.note(setup, state.model, unknown, last)["layer_values"] is None
    layers = unknown.layers.after({1: 1.0, 2: 2.0})
    found = federated.note(setup, state.model, replace(unknown, layers=layers), last)
    assert len(found["layer_values"]) == LAYERS - 1


def test_two_clients_train_all_layers_in_every_step() -> None:
    """An arm that draws a depth in each step may miss the lower layers; it does not count."""
    mixed = "configurator.depths=[[1],[1,0.25,0.25,0.25],[0.25]]"
    setup = setup_for(*UNPROTECTED, "configurator.policy=layer_values", MEANS, mixed)
    state = DROPPEFT.init(setup)
    memory = memory_of(state)
    layers = memory.layers.after({0: 0.1, 1: 0.1, 2: 0.1, 3: 4.0})
    state = replace(state, memory=replace(state.memory, bandit=replace(memory, layers=layers)))
    instructions = DROPPEFT.instruct(setup, state, 2, range(6))
    starts = [instruction.starts for instruction in instructions]
    assert starts.count((0,)) >= 2
    assert len(set(starts)) > 1


def test_values_are_relative_to_all_layers_above_the_frozen_ones() -> None:
    setup = setup_for(*UNPROTECTED, "frozen.layers=2", "configurator.policy=layer_values", MEANS)
    state = DROPPEFT.init(setup)
    memory = memory_of(state)
    last = federated.ArmsOfRound(1, {0: 0}, {}, {0: None}, (0.0,) * LAYERS, (1.0,) * LAYERS)
    memory = replace(memory, layers=memory.layers.after({2: 1.0, 3: 1.0}))
    assert max(federated.note(setup, state.model, memory, last)["quality"]) == 1.0


MEANS = "configurator.means=[0]"


def test_arms_that_drop_by_a_calibration_need_one() -> None:
    """Arms that drop nothing do not, and measure nothing."""
    calibrated = "dropout.shape=calibrated"
    with pytest.raises(DroppeftError, match="needs a calibration, and there is none"):
        DROPPEFT.init(setup_for(THOMPSON, "configurator.means=[0, 0.25]", calibrated))
    dropping_none = setup_for(THOMPSON, "configurator.means=[0]", calibrated)
    assert not dropping_none.config.calibrates
    assert memory_of(DROPPEFT.init(dropping_none)).arms
