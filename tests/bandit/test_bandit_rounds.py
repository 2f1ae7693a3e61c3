"""The bandit on a run: instructions by arm, seconds by the clock, nothing learnt from failures."""

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
from droppeft.messages import (
    HEAD,
    Failure,
    Instruction,
    ServerState,
    Update,
    first_trained_layer,
    flatten,
    payload_bytes,
)
from droppeft.methods import METHODS, Setup
from droppeft.methods.droppeft import DropPEFTMemory, configured_rates
from droppeft.runs.method_memory import decode_memory, encode_memory
from droppeft.server.round_cost import make_clock
from droppeft.server.rounds import run_round
from droppeft.server.run import resume_run, start_run
from droppeft.sharing.expected_costs import typical_bytes
from handmade import (
    ARITHMETIC,
    BACKWARD,
    FORWARD,
    LAYERS,
    REST,
    Scripted,
    answer_to,
    instruction_for,
    setup_for,
)
from runs import Recorder, outcome, rows_of, stop_after_a_round

DROPPEFT = METHODS["droppeft"]
THOMPSON = "configurator.policy=budgeted_thompson"
MEASURED = "configurator.reward=loss"
UNPROTECTED = ("dropout.protect_first=0", "dropout.protect_last=0")


def setup(*words: str) -> Setup:
    return setup_for(THOMPSON, MEASURED, *UNPROTECTED, "rounds=40", *words)


def given(setup: Setup, state: ServerState, round: int, cohort: list[int]) -> list[Arm]:
    return [arm for _, arm in numbered(setup, state, round, cohort)]


def numbered(
    setup: Setup, state: ServerState, round: int, cohort: list[int]
) -> list[tuple[int, Arm]]:
    return federated.arms_of_round(setup, state.model, memory_of(state), round, cohort)


def memory_of(state: ServerState) -> BanditMemory:
    memory: DropPEFTMemory = state.memory
    assert memory.bandit is not None
    return memory.bandit


def learnt(setup: Setup) -> ServerState:
    """After two rounds in which every arm was tried, with rewards that say little."""
    state = DROPPEFT.init(setup)
    for round in (1, 2):
        instructions = DROPPEFT.instruct(setup, state, round, list(range(6)))
        rewards = [
            answer_to(instruction, reward=0.1 * (instruction.client % 3))
            for instruction in instructions
        ]
        state = as_saved(DROPPEFT.merge(setup, state, instructions, rewards))
    return state


def as_saved(state: ServerState) -> ServerState:
    values = json.loads(json.dumps(encode_memory(state.memory)))
    return replace(state, memory=decode_memory(values, DropPEFTMemory))


# instructions


def test_fixed_instructions_what_was_planned_without_a_bandit() -> None:
    fixed = setup_for("dropout.mean=0.25")
    state = DROPPEFT.init(fixed)
    assert state.memory == DropPEFTMemory()
    for instruction in DROPPEFT.instruct(fixed, state, 1, [0, 1]):
        assert instruction.dropout is not None
        assert instruction.dropout.rates == configured_rates(fixed.config.dropout, LAYERS)
        assert (instruction.train, instruction.reward_rows) == (None, 0)
    assert DROPPEFT.note(fixed, state) is None


def test_a_instruction_drops_and_trains_what_its_arm_says() -> None:
    own = setup("configurator.reward_rows=7")
    state = learnt(own)
    seen = set()
    for round in range(3, 20):
        cohort = [0, 3, 7]
        instructions = DROPPEFT.instruct(own, state, round, cohort)
        for instruction, arm in zip(instructions, given(own, state, round, cohort), strict=True):
            lower = 2 if arm.untrained else 0
            seen.add(arm)
            assert instruction.dropout is not None
            assert sum(instruction.dropout.rates[lower:]) == pytest.approx(
                arm.mean * (LAYERS - lower)
            )
            assert not any(instruction.dropout.rates[:lower])
            assert first_trained_layer(instruction) == lower
            assert instruction.reward_rows == 7
            assert len(instruction.tensors) == LAYERS + 1  # every value travels to the client
            if lower:
                assert (
                    instruction.train == instruction.share == {"head.W", "layer.2.A", "layer.3.A"}
                )
    assert len(seen) > 3


def test_the_same_state_round_and_cohort_give_the_same_arms() -> None:
    own = setup()
    state = learnt(own)
    first = given(own, state, 1, [1, 2, 3])
    assert given(own, as_saved(state), 1, [1, 2, 3]) == first
    several = [given(own, state, round, [1, 2, 3]) for round in range(1, 9)]
    assert len(set(map(tuple, several))) > 2
    other = setup("seed=1")
    assert [given(other, state, round, [1, 2, 3]) for round in range(1, 9)] != several


def test_a_schedule_holds_for_every_arm() -> None:
    own = setup("rounds=10", "dropout.schedule=recovery")
    state = DROPPEFT.init(own)
    late = DROPPEFT.instruct(own, state, 9, [0, 1, 2])
    assert all(
        instruction.dropout is not None and not any(instruction.dropout.rates)
        for instruction in late
    )


def test_random_measures_nothing() -> None:
    own = setup_for("configurator.policy=uniform_random", *UNPROTECTED)
    state = DROPPEFT.init(own)
    instructions = DROPPEFT.instruct(own, state, 1, [0, 1, 2])
    assert {instruction.reward_rows for instruction in instructions} == {0}


# What is learnt


def test_rewards_count_for_the_arm_that_the_client_had() -> None:
    own = setup()
    state = DROPPEFT.init(own)
    cohort = [0, 1, 2, 3, 4]
    instructions = DROPPEFT.instruct(own, state, 1, cohort)
    rewards = [0.1, None, 0.3, 0.4, 0.5]
    replies = [
        answer_to(instruction, reward=reward)
        for instruction, reward in zip(instructions, rewards, strict=True)
    ]
    replies[2] = Failure(2, "asleep")  # type: ignore[call-overload]
    after = as_saved(DROPPEFT.merge(own, state, instructions, replies))
    numbers = [number for number, _ in numbered(own, state, 1, cohort)]
    observations = memory_of(after).observations
    assert [(one.arm, one.reward) for one in observations] == [
        (numbers[0], 0.1),
        (numbers[3], 0.4),
        (numbers[4], 0.5),
    ]
    note = DROPPEFT.note(own, after)
    assert note is not None
    assert note["chosen"] == {str(client): number for client, number in enumerate(numbers)}
    assert sum(note["trials"]) == 3
    assert set(note["labels"]) == {str(number) for number in note["present"]}


def test_a_round_of_failures_shows_nothing() -> None:
    own = setup()
    state = DROPPEFT.init(own)
    instructions = DROPPEFT.instruct(own, state, 1, [0, 1])
    after = DROPPEFT.merge(
        own, state, instructions, [Failure(instruction.client, "x") for instruction in instructions]
    )
    known, before = memory_of(after), memory_of(state)
    assert replace(known, tried=before.tried) == before
    assert known.tried == {number for number, _ in numbered(own, state, 1, [0, 1])}


def test_importance_is_of_the_layers_that_were_trained_and_ran() -> None:
    """Layers 2 and 3 alone are trained by client 1; layer 2 does not run on client 0."""
    own = setup()
    state = DROPPEFT.init(own)
    whole, part = instruction_for(0), instruction_for(1)
    names = frozenset({"head.W", "layer.2.A", "layer.3.A"})
    part = replace(part, train=names, share=names)
    updates = [
        answer_to(whole, importance=(1.0, 2.0, 0.0, 4.0), active_steps=(2, 2, 0, 2)),
        answer_to(part, importance=(0.0, 0.0, 5.0, 8.0), active_steps=(2, 2, 2, 2)),
    ]
    memory = federated.learned(own, state.model, memory_of(state), [whole, part], updates)[0]
    assert memory.importance == (1.0, 2.0, 5.0, 6.0)
    assert memory.row_length == 64 / 8


# What arms take


@pytest.mark.parametrize(
    "sharing", [(), ("sharing.fraction=0.5", "configurator.untrained=[0, 0.25, 0.75]")]
)
def test_seconds_are_those_that_the_clock_will_charge(sharing: tuple[str, ...]) -> None:
    """Ten steps of 16 rows: what is expected is a turn whose rows and gates are the mean ones.

    Of the layers that an arm trains half travel up, halves rounded up: the lowest here.
    """
    own = setup("training.local_steps=10", "clock.profiles=laptop_cpu", *sharing)
    state = DROPPEFT.init(own)
    memory = replace(memory_of(state), row_length=8.0)
    assert own.clock is not None
    for arm in memory.arms.values():
        instruction = _instruction_of(own, state, arm)
        lower = first_trained_layer(instruction)
        rates = instruction.dropout.rates if instruction.dropout else ()
        tokens = 10 * 16 * 8
        update = _update_of(instruction, tokens, [round(tokens * (1 - rate)) for rate in rates])
        if sharing:
            shared = range(lower, lower + (LAYERS - lower + 1) // 2)
            sent = {key: instruction.tensors[key] for key in (*shared, HEAD)}
            update = replace(update, tensors=sent)
        charged = own.clock.client_cost(instruction, update)
        profile = own.clock.fleet.profile(0)
        expected = arm_costs.local_training_seconds(own, state.model, memory, 1, arm, profile)
        # The instruction is a first one, which brings all layers: later ones bring those of last
        # time.
        more = payload_bytes(instruction.tensors) - typical_bytes(own.config, state.model.tensors)
        assert (more > 0) == bool(sharing)
        later = charged.total_s - more * seconds_per_byte(profile.download)
        assert expected == pytest.approx(later, rel=1e-10)
        # By hand: per token forward below, both above, head and embeddings always.
        active = sum(1 - rate for rate in rates[lower:])
        flops = tokens * (lower * FORWARD + active * (FORWARD + BACKWARD) + 2 * REST)
        assert charged.train_s == pytest.approx(flops / 3e11 + 10 * 0.02, rel=1e-6)


def _instruction_of(own: Setup, state: ServerState, arm: Arm) -> Instruction:
    memory = replace(memory_of(state), arms={0: arm})
    only = replace(state, memory=replace(state.memory, bandit=memory))
    [instruction] = DROPPEFT.instruct(own, only, 1, [0])
    return instruction


def _update_of(instruction: Instruction, tokens: int, layer_tokens: list[int]) -> Update:
    update = answer_to(instruction, reward=0.1, steps=10, active_steps=(10,) * LAYERS, examples=160)
    cost = replace(
        update.cost,
        tokens=tokens,
        rows=160,
        layer_tokens=tuple(layer_tokens),
        reward_tokens=2 * instruction.reward_rows * tokens // 160,
    )
    return replace(update, cost=cost)


def with_memory_limits(*limits: float) -> Setup:
    """One profile for each number of bytes."""
    own = {
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
    profiles = {name: DeviceProfile.model_validate(one) for name, one in own.items()}
    clock = plain.config.clock.model_copy(update={"own": profiles, "profiles": tuple(profiles)})
    config = plain.config.model_copy(update={"clock": clock})
    fleet = make_fleet(clock, config.clients, config.seed)
    # Each layer stores a megabyte, the rest nothing.
    counts = [
        replace(count, blocks=tuple(replace(one, stored_bytes=10**6) for one in count.blocks))
        for count in ARITHMETIC.counts
    ]
    stored = replace(ARITHMETIC, counts=tuple(counts))
    return replace(plain, config=config, clock=make_clock(fleet, lambda spec: stored))


PROCESS = 500_000_000


def test_an_arm_that_does_not_fit_is_never_given() -> None:
    """Two megabytes: two of four layers at a time, and no more."""
    own = with_memory_limits(PROCESS + 2.5e6, PROCESS + 1e9)
    state = DROPPEFT.init(own)
    assert own.clock is not None
    small = [client for client in range(10) if own.clock.fleet.names[client] == "kind0"]
    assert len(small) == 5
    for policy in (*POLICIES,):
        chosen = own.config.configurator.model_copy(update={"policy": policy})
        other = replace(own, config=own.config.model_copy(update={"configurator": chosen}))
        for round in range(1, 15):
            for arm in given(other, state, round, small):
                lower = 2 if arm.untrained else 0
                assert (LAYERS - lower) * (1 - arm.mean) <= 2


def test_a_client_that_no_arm_fits_stops_the_run() -> None:
    said = "no arm of the configurator fits a kind0: the least takes 0.50 GB, it has 0.50; lower"
    with pytest.raises(DroppeftError, match=said):
        DROPPEFT.init(with_memory_limits(PROCESS + 0.5e6))


def test_a_client_without_the_memory_for_the_last_rounds_stops_the_run() -> None:
    """At full depth only an arm with a prefix fits, and there is none."""
    fits = with_memory_limits(PROCESS + 2.5e6)
    words = {"prefixes": (0.0,)}
    settings = fits.config.configurator.model_copy(update=words)
    config = fits.config.model_copy(update={"configurator": settings})
    DROPPEFT.init(replace(fits, config=config))
    recovers = config.dropout.model_copy(update={"schedule": "recovery"})
    with pytest.raises(DroppeftError, match="no arm of the configurator fits a kind0"):
        DROPPEFT.init(replace(fits, config=config.model_copy(update={"dropout": recovers})))


def test_slower_clients_get_cheaper_arms() -> None:
    """Once it is known that dropping costs little: the cohort finishes together."""
    own = setup("clock.profiles=jetson_tx2,jetson_agx_xavier", "training.local_steps=100")
    state = DROPPEFT.init(own)
    for round in range(1, 30):
        instructions = DROPPEFT.instruct(own, state, round, list(range(10)))
        arms = given(own, state, round, list(range(10)))
        replies = [
            answer_to(instruction, reward=1.0 - 0.2 * arm.mean - 0.1 * arm.untrained)
            for instruction, arm in zip(instructions, arms, strict=True)
        ]
        state = as_saved(DROPPEFT.merge(own, state, instructions, replies))
    assert own.clock is not None
    names = own.clock.fleet.names
    last = given(own, state, 30, list(range(10)))
    work = {
        name: np.mean([1 - arm.mean for place, arm in enumerate(last) if names[place] == name])
        for name in ("jetson_tx2", "jetson_agx_xavier")
    }
    assert work["jetson_tx2"] < work["jetson_agx_xavier"]


def test_clients_can_be_taken_as_alike() -> None:
    """Then which of them is slow changes nothing."""
    words = ("training.local_steps=100", "configurator.by_profile=false")
    mixed = setup("clock.profiles=jetson_tx2,jetson_agx_xavier", *words)
    turned = setup("clock.profiles=jetson_agx_xavier,jetson_tx2", *words)
    state = learnt(mixed)
    for round in range(1, 9):
        cohort = list(range(10))
        assert given(mixed, state, round, cohort) == given(turned, state, round, cohort)
    by_class = setup("clock.profiles=jetson_tx2,jetson_agx_xavier", words[0])
    assert any(
        given(by_class, state, round, [0, 1, 2]) != given(mixed, state, round, [0, 1, 2])
        for round in range(1, 9)
    )


def test_without_a_clock_there_is_no_bandit() -> None:
    with pytest.raises(DroppeftError, match=r"set configurator\.policy=fixed"):
        DROPPEFT.init(replace(setup(), clock=None))


def test_impossible_arms_stop_before_anything_is_written() -> None:
    with pytest.raises(DroppeftError, match="no arm of the configurator is possible"):
        DROPPEFT.init(setup_for(THOMPSON, "configurator.means=[0.9]", "configurator.untrained=[0]"))


def test_no_arm_is_given_that_ends_behind_the_deadline() -> None:
    """Where a client has none in time it may have any."""
    words = ("clock.profiles=jetson_tx2,jetson_agx_xavier", "training.local_steps=100")
    plain = setup(*words)
    state = learnt(plain)
    memory = memory_of(state)
    assert plain.clock is not None
    fleet = plain.clock.fleet
    slow = next(d for d in range(10) if fleet.names[d] == "jetson_tx2")
    takes = dict(
        zip(
            memory.arms.values(),
            arm_costs.seconds_of(plain, state.model, memory, 3, fleet.profile(slow)),
            strict=True,
        )
    )
    middle = sorted(takes.values())[2]
    tight = setup(*words, f"clock.deadline_s={middle + 1e-6}")
    for round in range(3, 20):
        [arm] = given(tight, state, round, [slow])
        assert takes[arm] <= middle
    never = setup(*words, "clock.deadline_s=0.001")
    assert given(never, state, 3, [slow])


def test_prompts_have_no_prefixes() -> None:
    """They stand before the first layer: all others have a backward."""
    own = setup("adapter.type=prompt_tuning")
    arms = memory_of(DROPPEFT.init(own)).arms.values()
    assert {arm.untrained for arm in arms} == {0.0}
    state = learnt(setup("adapter.type=prompt_tuning", "configurator.refresh=1"))
    assert {arm.untrained for arm in memory_of(state).arms.values()} == {0.0}
    instruction = instruction_for(0, train=frozenset({"prompt"}))
    prompt = {**instruction.tensors, "other": {"prompt": np.zeros(1, np.float32)}}
    assert first_trained_layer(replace(instruction, tensors=prompt)) == 0


def test_rounds_at_a_schedule_s_full_depth_show_nothing_of_arms() -> None:
    own = setup("dropout.schedule=recovery", "configurator.refresh=1")
    state = learnt(own)
    instructions = DROPPEFT.instruct(own, state, 39, [0, 1, 2])
    assert {instruction.reward_rows for instruction in instructions} == {0}
    after = DROPPEFT.merge(
        own,
        state,
        instructions,
        [answer_to(instruction, reward=9.0) for instruction in instructions],
    )
    assert memory_of(after).arms == memory_of(state).arms
    assert 9.0 not in [one.reward for one in memory_of(after).observations]


@pytest.mark.parametrize("policy", POLICIES)
def test_where_nothing_is_measured_nothing_is_tried(policy: str) -> None:
    own = setup("dropout.schedule=recovery", f"configurator.policy={policy}")
    state = learnt(own)
    arms = {tuple(given(own, state, round, [0, 1, 2])) for round in range(30, 40)}
    assert len(arms) == 1


def test_new_arms_are_such_as_the_configuration_has() -> None:
    words = (
        "configurator.untrained=[0]",
        'configurator.shapes=["decay"]',
        "configurator.refresh=1",
    )
    own = setup(*words)
    state = learnt(own)
    for round in range(3, 12):
        instructions = DROPPEFT.instruct(own, state, round, list(range(6)))
        rewards = [
            answer_to(instruction, reward=0.1 * (instruction.client % 3))
            for instruction in instructions
        ]
        state = as_saved(DROPPEFT.merge(own, state, instructions, rewards))
        arms = memory_of(state).arms.values()
        assert {arm.untrained for arm in arms} == {0.0}
        assert {arm.shape for arm in arms} <= {"uniform", "decay"}  # nothing dropped is uniform
    assert memory_of(state).next_number > 5


def test_arms_that_fit_nobody_are_no_candidates() -> None:
    own = with_memory_limits(PROCESS + 2.5e6)
    state = DROPPEFT.init(own)
    for arm in memory_of(state).arms.values():
        assert (LAYERS - 2 * bool(arm.untrained)) * (1 - arm.mean) <= 2


def test_a_round_without_clients_leaves_no_note() -> None:
    own = setup()
    state = learnt(own)
    assert DROPPEFT.note(own, state) is not None
    after = DROPPEFT.merge(own, state, [], [])
    assert memory_of(after) == memory_of(state)
    assert DROPPEFT.note(own, after) is None


def test_a_bandwidth_that_varies_takes_longer_than_its_mean() -> None:
    """Half of the draws of N(1, 2.25²) are cut off at 1 MB/s; found by drawing."""
    link = PROFILES["jetson_tx2"].upload
    drawn = np.random.default_rng(0).normal(link.mean, link.deviation, 200_000)
    expected = np.mean(1 / np.clip(drawn, link.least, link.most))
    assert seconds_per_byte(link) == pytest.approx(expected, rel=0.01)
    assert seconds_per_byte(PROFILES["laptop_cpu"].upload) == 1 / 2.5e6


@pytest.mark.parametrize(
    "word", ["configurator.untrained=[-0.5]", "configurator.means=[0, 50]", "configurator.means=[]"]
)
def test_shares_are_shares(word: str) -> None:
    with pytest.raises(DroppeftError, match=r"configurator\.(means|prefixes)"):
        load_config(None, [word])


# Rounds and runs


def test_the_order_of_arrival_does_not_matter() -> None:
    own = setup("configurator.refresh=2")

    def play(*, backwards: bool) -> BanditMemory:
        state = DROPPEFT.init(own)
        for round in range(1, 7):
            transport = Scripted(
                lambda instruction: [answer_to(instruction, reward=0.1 * (instruction.client % 4))],
                backwards=backwards,
            )
            state, _ = run_round(own, DROPPEFT, transport, state, round, lambda reply: None)
        return memory_of(state)

    memory = play(backwards=False)
    assert memory.next_number > len(memory.arms)  # some arm was exchanged
    assert memory == play(backwards=True)


@pytest.mark.parametrize("reward", ["agreement", "loss"])
def test_a_run_that_was_stopped_goes_on_with_what_it_knew(
    tiny_words: list[str], tmp_path: Path, reward: str
) -> None:
    typical = [word for word in tiny_words if not word.startswith("dropout.")]
    words = [*typical, THOMPSON, f"configurator.reward={reward}", *UNPROTECTED, "rounds=5"]
    start_run(load_config(None, words), tmp_path / "whole", Recorder())
    stop_after_a_round(words, tmp_path / "run")
    resume_run(tmp_path / "run", Recorder())
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    rows = rows_of(tmp_path / "whole" / "rounds.jsonl")
    assert all(row["notes"]["chosen"].keys() == {str(d) for d in row["cohort"]} for row in rows)
    assert all(0 <= row["idle_modelled_share"] < 1 for row in rows)
    clients = rows_of(tmp_path / "whole" / "clients.jsonl")
    measured = [row["reward"] is not None and row["reward_modelled_s"] > 0 for row in clients]
    assert set(measured) == {reward == "loss"}
    rewards = [reward for row in rows for reward in row["notes"]["rewards"].values()]
    assert None not in rewards
    assert len({*rewards}) > 1


@pytest.mark.parametrize("policy", ["epsilon_greedy", "successive_halving", "uniform_random"])
def test_every_policy_plays_a_run(policy: str, tiny_words: list[str], tmp_path: Path) -> None:
    typical = [word for word in tiny_words if not word.startswith("dropout.")]
    words = [
        *typical,
        f"configurator.policy={policy}",
        MEASURED,
        *UNPROTECTED,
        "configurator.stage=1",
    ]
    start_run(load_config(None, words), tmp_path / "run", Recorder())
    notes = [row["notes"] for row in rows_of(tmp_path / "run" / "rounds.jsonl")]
    present = [len(note["present"]) for note in notes]
    halves = policy == "successive_halving"
    assert (present[-1] < present[0]) == halves
    clients = rows_of(tmp_path / "run" / "clients.jsonl")
    assert all((row["reward"] is None) == (policy == "uniform_random") for row in clients)


def test_what_an_untrained_layer_costs_is_its_forward() -> None:
    """The clock, on an instruction that trains from layer 2 up."""
    names = frozenset({"head.W", "layer.2.A", "layer.3.A"})
    instruction = instruction_for(0, train=names, share=names)
    assert first_trained_layer(instruction) == 2
    assert first_trained_layer(instruction_for(0)) == 0
    assert first_trained_layer(replace(instruction, train=frozenset({"head.W"}))) == LAYERS
    config = resolve(load_config(None, ["clients=1", "cohort_size=1"]), cuda=False)
    clock = config.clock.model_copy(update={"profiles": ("laptop_cpu",)})
    fleet = make_fleet(clock, 1, 0)
    update = answer_to(instruction, active_steps=(2, 2, 2, 2))
    update = replace(update, cost=replace(update.cost, layer_tokens=(64,) * 4))
    charged = make_clock(fleet, lambda spec: ARITHMETIC).client_cost(instruction, update).train_s
    flops = 64 * (2 * FORWARD + 2 * (FORWARD + BACKWARD) + 2 * REST)
    profile = PROFILES["laptop_cpu"]
    assert charged == pytest.approx(flops / profile.effective_flops_per_s + 2 * 0.02)
    assert [key for key, _, _ in flatten(update.tensors)] == [2, 3, "head"]
