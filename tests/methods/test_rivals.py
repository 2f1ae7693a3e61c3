"""The rules of the methods that DropPEFT is compared with, against numbers derived by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from droppeft.config import DeviceProfile, load_config
from droppeft.costs.device_profiles import PROFILES
from droppeft.costs.modelled_clock import Arithmetic
from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.data.partition import partition_rows
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import AdapterSpec, Instruction
from droppeft.messages.reply import Failure, Update
from droppeft.messages.tensors import HEAD, Tensors, flatten
from droppeft.methods import METHODS, Setup
from droppeft.methods.fedadapter import DEEPER, SAME, TRIAL_ROUNDS, WIDER
from droppeft.methods.fedhetlora import Ranks, product_norm, resized, tail_norm
from droppeft.methods.legend import ranks
from droppeft.server.round_cost import make_clock
from droppeft.server.run import start_run
from handmade import ARITHMETIC, LAYERS, fresh, layout_shaped, setup_for, shaped, update_for
from runs import Recorder, rows_of


def layers_of(instruction: Instruction) -> list[int]:
    return [key for key in instruction.tensors if isinstance(key, int)]


MIXED = "clock.profiles=jetson_tx2,jetson_agx_xavier"


# FedRA


def test_fedra_runs_trains_and_shares_the_layers_that_were_drawn() -> None:
    setup = setup_for("method=fedra", "dropout.count=2", "dropout.protect_first=0")
    method = METHODS["fedra"]
    seen = set()
    for round in range(1, 9):
        for instruction in method.instruct(setup, method.init(setup), round, [0, 1]):
            layers = layers_of(instruction)
            assert len(layers) == 2
            assert 3 in layers  # the last layer is protected
            assert instruction.dropout is not None
            assert instruction.dropout.rates == tuple(
                float(layer not in layers) for layer in range(4)
            )
            assert instruction.dropout.every is None
            names = {name for _, name, _ in flatten(instruction.tensors)}
            assert instruction.train == instruction.share == names
            assert "head.W" in names
            seen.add(tuple(layers))
    assert seen == {(0, 3), (1, 3), (2, 3)}


def test_fedra_draws_per_client_and_round_and_reproducibly() -> None:
    setup, method = setup_for("method=fedra", "dropout.count=1"), METHODS["fedra"]
    rows = [
        [
            tuple(layers_of(instruction))
            for instruction in method.instruct(setup, method.init(setup), r, range(8))
        ]
        for r in (1, 2, 1)
    ]
    assert rows[0] == rows[2] != rows[1]
    assert set(rows[0]) == {(0, 1, 3), (0, 2, 3)}  # first and last layer are protected


def test_fedra_can_drop_every_layer_as_in_its_paper() -> None:
    ends = ("dropout.protect_first=0", "dropout.protect_last=0")
    setup, method = setup_for("method=fedra", "dropout.count=1", *ends), METHODS["fedra"]
    state = method.init(setup)
    instructions = [
        instruction
        for r in range(1, 6)
        for instruction in method.instruct(setup, state, r, range(8))
    ]
    dropped = [
        instruction.dropout.rates.index(1.0)
        for instruction in instructions
        if instruction.dropout is not None
    ]
    assert len(dropped) == 5 * 8
    assert set(dropped) == set(range(LAYERS))


def test_fedra_without_a_head_gives_every_client_a_layer() -> None:
    """An optimizer without parameters would be an error; a language model has no head."""

    def without_head(spec: AdapterSpec) -> Tensors:
        return {key: tensors for key, tensors in fresh(spec).items() if key != HEAD}

    ends = ("dropout.protect_first=0", "dropout.protect_last=0", "dropout.sampling=bernoulli")
    setup = setup_for("method=fedra", "dropout.mean=0.75", *ends)
    setup, method = replace(setup, fresh_tensors=without_head), METHODS["fedra"]
    state = method.init(setup)
    trained = [
        sum(rate == 0 for rate in instruction.dropout.rates)
        for r in range(1, 9)
        for instruction in method.instruct(setup, state, r, range(8))
        if instruction.dropout is not None
    ]
    assert len(trained) == 64
    assert min(trained) == 1 < max(trained)
    setup = replace(setup_for("method=fedra", "dropout.mean=1", *ends), fresh_tensors=without_head)
    with pytest.raises(DroppeftError, match="are dropped in nearly every step"):
        method.init(setup)


def test_fedra_averages_a_layer_over_the_clients_that_drew_it() -> None:
    setup, method = setup_for("method=fedra", "dropout.count=1"), METHODS["fedra"]
    state = method.init(setup)
    instructions = method.instruct(setup, state, 1, range(8))
    with_one = [instruction for instruction in instructions if 1 in layers_of(instruction)]
    other = next(instruction for instruction in instructions if 2 in layers_of(instruction))
    chosen = [with_one[0], other]
    updates = [update_for(chosen[0], 3.0, examples=10), update_for(chosen[1], 7.0, examples=30)]
    merged = method.merge(setup, state, chosen, updates).model.tensors
    values = [float(next(iter(merged[layer].values()))[0]) for layer in range(LAYERS)]
    assert values == [6.0, 3.0, 7.0, 6.0]  # (10 · 3 + 30 · 7) / 40 = 6


# LEGEND


def test_legend_ranks_grow_from_half_to_one_and_a_half() -> None:
    assert ranks(8, 4) == (5, 7, 9, 11)  # 8 · (2.5, 3.5, 4.5, 5.5) / 4
    for rank, depth in ((8, 12), (16, 24), (4, 6)):
        found = ranks(rank, depth)
        assert sum(found) / depth == pytest.approx(rank, rel=0.05)
        assert list(found) == sorted(found)
        assert (found[0], found[-1]) == pytest.approx((rank / 2, rank * 1.5), abs=1)
    assert min(ranks(1, 24)) == 1


def test_legend_gives_a_client_the_layers_that_it_has_time_for() -> None:
    """The fast profile trains all four layers, the slow one only the minimum, a quarter."""
    setup, method = shaped("method=legend", MIXED), METHODS["legend"]
    assert setup.clock is not None
    state = method.init(setup)
    assert [layer.rank for layer in state.model.adapter.layers if layer] == [5, 7, 9, 11]
    names = setup.clock.fleet.names
    depths = {}
    for instruction in method.instruct(setup, state, 1, range(10)):
        depth = depths[names[instruction.client]] = len(layers_of(instruction))
        assert layers_of(instruction) == list(range(LAYERS - depth, LAYERS))
        assert instruction.adapter.layers[: LAYERS - depth] == (None,) * (LAYERS - depth)
        assert instruction.share == set(layout_shaped(instruction.adapter))
    assert depths == {"jetson_tx2": 1, "jetson_agx_xavier": 4}


@pytest.mark.parametrize(
    ("speed", "depth"),
    # Per token: a layer costs 1 forward and 2 backward, the rest 20. Training all four layers costs
    # 4 · 3 + 20 = 32, three of them 30, two of them 4 · 1 + 2 · 2 + 20 = 28.
    [(1.0, 4), (31 / 32, 3), (30 / 32, 3), (29 / 32, 2), (28.01 / 32, 2), (27 / 32, 1), (0.1, 1)],
)
def test_legend_depth_by_hand(speed: float, depth: int) -> None:
    setup = shaped("method=legend", MIXED)
    assert setup.clock is not None
    fast = replace_profile(PROFILES["jetson_tx2"], 1e12)
    slow = replace_profile(PROFILES["jetson_tx2"], speed * 1e12)
    fleet = replace(setup.clock.fleet, profiles={"jetson_tx2": slow, "jetson_agx_xavier": fast})
    setup = replace(setup, clock=replace(setup.clock, fleet=fleet))
    client = fleet.names.index("jetson_tx2")
    [instruction] = METHODS["legend"].instruct(setup, METHODS["legend"].init(setup), 1, [client])
    assert len(layers_of(instruction)) == depth


def replace_profile(profile: DeviceProfile, speed: float) -> DeviceProfile:
    """The profile with another speed and no overhead per step."""
    return profile.model_copy(update={"effective_flops_per_s": speed, "step_overhead_s": 0.0})


def test_legend_uses_assigned_profiles_only() -> None:
    setup, method = shaped("method=legend", MIXED, "clients=1", "cohort_size=1"), METHODS["legend"]
    [instruction] = method.instruct(setup, method.init(setup), 1, [0])
    assert layers_of(instruction) == [0, 1, 2, 3]


def test_legend_with_one_profile_trains_every_layer() -> None:
    setup, method = shaped("method=legend", "clock.profiles=jetson_tx2"), METHODS["legend"]
    for instruction in method.instruct(setup, method.init(setup), 1, [0, 1]):
        assert layers_of(instruction) == [0, 1, 2, 3]


def test_legend_without_a_clock_trains_every_layer() -> None:
    setup, method = replace(shaped("method=legend", MIXED), clock=None), METHODS["legend"]
    for instruction in method.instruct(setup, method.init(setup), 1, range(10)):
        assert layers_of(instruction) == [0, 1, 2, 3]


# FedHetLoRA

A, B = "x.lora_A.weight", "x.lora_B.weight"


def pair(a: Any, b: Any) -> Tensors:
    return {0: {A: np.array(a, np.float32), B: np.array(b, np.float32)}}


def test_truncating_and_padding_change_ranks_only() -> None:
    tensors = pair([[1, 2], [3, 4]], [[5, 6]])
    cut = resized(tensors, 1)
    np.testing.assert_array_equal(cut[0][A], [[1, 2]])
    np.testing.assert_array_equal(cut[0][B], [[5]])
    back = resized(cut, 3)
    np.testing.assert_array_equal(back[0][A], [[1, 2], [0, 0], [0, 0]])
    np.testing.assert_array_equal(back[0][B], [[5, 0, 0]])
    head: Tensors = {HEAD: {"head.W": np.ones((4, 4), np.float32)}}
    np.testing.assert_array_equal(resized(head, 1)[HEAD]["head.W"], np.ones((4, 4)))


def test_the_norm_of_a_product() -> None:
    """B·A = [[1, 2], [6, 8]]; over two pairs, the root of the sum of squares."""
    one = pair([[1, 2], [3, 4]], [[1, 0], [0, 2]])
    assert product_norm(one) == pytest.approx(np.linalg.norm([[1, 2], [6, 8]]))
    two: Tensors = {**one, 1: {name.replace("x", "y"): v for name, v in one[0].items()}}
    assert product_norm(two) == pytest.approx(np.sqrt(2 * 105))
    assert product_norm({HEAD: {"head.W": np.ones(3, np.float32)}}) == 0


def test_fedhetlora_weights_by_the_norm_of_the_product() -> None:
    """Ranks 2 and 1, norms 3 and 1: (3 · x + 1 · y) / 4, where y is padded with zeros."""
    setup, method = (
        shaped("method=fedhetlora", "adapter.rank=2"),
        METHODS["fedhetlora"],
    )
    state = replace(method.init(setup), memory=Ranks((2, 1, *[2] * 8)))
    instructions = method.instruct(setup, state, 1, [0, 1])
    assert [
        instruction.adapter.layers[0].rank
        for instruction in instructions
        if instruction.adapter.layers[0]
    ] == [2, 1]
    # alpha / rank stays 2
    assert [instruction.adapter.alpha for instruction in instructions] == [4.0, 2.0]
    updates = [update_for(instruction, 0.0) for instruction in instructions]
    for update, size in zip(updates, (3.0, 1.0), strict=True):
        named = update.tensors[0]
        assert isinstance(named, dict)
        named["0.lora_A.weight"][0, 0] = 1.0
        named["0.lora_B.weight"][0, 0] = size
    updates[0].tensors[0]["0.lora_A.weight"][1, 2] = 8.0  # type: ignore[index]
    merged = method.merge(setup, state, instructions, updates).model.tensors[0]
    np.testing.assert_allclose(merged["0.lora_B.weight"][0], [(3 * 3 + 1 * 1) / 4, 0])
    np.testing.assert_allclose(merged["0.lora_A.weight"], [[1, 0, 0], [0, 0, 3 * 8 / 4]])


def test_fedhetlora_prunes_ranks_that_training_made_smaller() -> None:
    setup, method = (
        shaped("method=fedhetlora", "adapter.rank=2"),
        METHODS["fedhetlora"],
    )
    state = replace(method.init(setup), memory=Ranks((2,) * 10))
    tensors = {
        key: {name: np.ones_like(value) for name, value in named.items()}
        for key, named in state.model.tensors.items()
    }
    state = replace(state, model=replace(state.model, tensors=tensors))
    instructions = method.instruct(setup, state, 1, [0, 1])
    assert {
        instruction.objective.rank_penalty.unpenalised
        for instruction in instructions
        if instruction.objective.rank_penalty
    } == {1}
    updates = [update_for(instructions[0], 0.5), update_for(instructions[1], 2.0)]
    after = method.merge(setup, state, instructions, updates)
    assert after.memory == Ranks((1, *[2] * 9))
    # The second rank of the first client is pruned before averaging, and counts as 0.
    a = after.model.tensors[0]["0.lora_A.weight"]
    cut = resized(updates[0].tensors, 1)
    norms = [product_norm(cut), product_norm(updates[1].tensors)]
    np.testing.assert_allclose(a[1], 2.0 * norms[1] / sum(norms), rtol=1e-6)
    np.testing.assert_allclose(a[0], (0.5 * norms[0] + 2.0 * norms[1]) / sum(norms), rtol=1e-6)
    [again, _] = method.instruct(setup, after, 2, [0, 1])
    assert again.adapter.layers[0] is not None
    assert again.adapter.layers[0].rank == 1


def test_fedhetlora_never_prunes_below_the_smallest_rank() -> None:
    """A quarter of 8 is 2: three rounds prune a client from 4 to 3 to 2, and no further."""
    setup, method = shaped("method=fedhetlora", "adapter.rank=8"), METHODS["fedhetlora"]
    state = replace(method.init(setup), memory=Ranks((4,) * 10))
    seen = []
    for round in (1, 2, 3):
        ones = {
            key: {name: np.ones_like(value) for name, value in named.items()}
            for key, named in state.model.tensors.items()
        }
        state = replace(state, model=replace(state.model, tensors=ones))
        instructions = method.instruct(setup, state, round, [0])
        state = method.merge(setup, state, instructions, [update_for(instructions[0], 0.5)])
        penalty = instructions[0].objective.rank_penalty
        assert penalty is not None
        ranks_of = state.memory.ranks
        seen.append((penalty.unpenalised, ranks_of[0]))
    assert seen == [(3, 3), (2, 2), (2, 2)]


def test_the_norm_of_the_last_ranks() -> None:
    tensors = pair([[9, 9], [3, 4]], [[9, 2], [9, 0]])
    assert tail_norm(tensors, start=1) == pytest.approx(5 * 2)
    assert tail_norm(pair([[9, 9]], [[9], [9]]), start=1) == 0


def test_fedhetlora_initial_ranks_follow_from_speed_or_the_seed() -> None:
    method = METHODS["fedhetlora"]
    mixed = shaped("method=fedhetlora", MIXED)
    assert mixed.clock is not None
    ranks_of = method.init(mixed).memory.ranks
    by_profile = dict(zip(mixed.clock.fleet.names, ranks_of, strict=True))
    assert by_profile == {"jetson_tx2": 2, "jetson_agx_xavier": 8}
    alike = method.init(shaped("method=fedhetlora", "clock.profiles=jetson_tx2")).memory.ranks
    assert sorted(alike) == [2, 2, 2, 2, 5, 5, 5, 8, 8, 8]


# FedAdapter

GROWING = ("method=fedadapter", "adapter.type=bottleneck", "adapter.width=16")


def rewarded(instruction: Instruction, rewards: dict[int, float]) -> Update:
    """An update whose reward is that of its adapter, by 10 · depth + width."""
    [width] = {layer.width for layer in instruction.adapter.layers if layer}
    depth = sum(layer is not None for layer in instruction.adapter.layers)
    return update_for(instruction, 5.0, reward=rewards[10 * depth + (width or 0)])


def state_after_trial(setup: Setup, rewards: dict[int, float], state: Any = None) -> Any:
    method = METHODS["fedadapter"]
    state = state or method.init(setup)
    for round in range(1, TRIAL_ROUNDS + 1):
        instructions = method.instruct(setup, state, round, [0, 1, 2])
        state = method.merge(
            setup,
            state,
            instructions,
            [rewarded(instruction, rewards) for instruction in instructions],
        )
    return state


def test_fedadapter_groups_have_one_more_layer_or_are_eight_wider() -> None:
    setup, method = shaped(*GROWING), METHODS["fedadapter"]
    state = method.init(setup)
    instructions = method.instruct(setup, state, 1, [4, 5, 6])
    shapes = [
        (layers_of(instruction), {layer.width for layer in instruction.adapter.layers if layer})
        for instruction in instructions
    ]
    assert sorted(shapes, key=str) == [([1, 2, 3], {8}), ([2, 3], {16}), ([2, 3], {8})]
    assert {instruction.frozen for instruction in instructions} == {1}
    assert all(instruction.reward_rows > 0 for instruction in instructions)
    groups = [[id(p.adapter) for p in method.instruct(setup, state, r, [4, 5, 6])] for r in (1, 2)]
    assert groups[0] != groups[1]


@pytest.mark.parametrize(
    ("rewards", "depth", "width"),
    [
        ({28: 0.3, 38: 0.2, 36: 0.1}, 2, 8),
        ({28: 0.1, 38: 0.3, 36: 0.2}, 3, 8),
        ({28: 0.1, 38: 0.2, 36: 0.3}, 2, 16),
        ({28: 0.2, 38: 0.2, 36: 0.2}, 2, 8),
    ],
)
def test_fedadapter_continues_with_the_group_of_the_largest_reward(
    rewards: dict[int, float], depth: int, width: int
) -> None:
    state = state_after_trial(shaped(*GROWING), rewards)
    assert (state.memory.depth, state.memory.width) == (depth, width)
    assert state.memory.rounds == 0
    assert sum(layer is not None for layer in state.model.adapter.layers) == depth
    values = {float(value) for _, _, array in flatten(state.model.tensors) for value in array.flat}
    assert values == {5.0}


def test_fedadapter_stops_growing_at_its_limits() -> None:
    setup = shaped(*GROWING)
    state = state_after_trial(setup, {28: 0.1, 38: 0.2, 36: 0.3})
    assert set(state.alternatives) == {DEEPER}  # width 16 is the configured limit
    for depth in (3, 4):
        state = state_after_trial(
            setup, {26 + 10: 0.1, 10 * (depth - 1) + 16: 0.1, 10 * depth + 16: 0.5}, state
        )
        assert state.memory.depth == depth
    assert set(state.alternatives) == set()
    assert set(state.memory.rewards) == {SAME}
    instructions = METHODS["fedadapter"].instruct(setup, state, 1, [0, 1, 2])
    assert {instruction.reward_rows for instruction in instructions} == {0}


def test_fedadapter_growth_keeps_the_function() -> None:
    setup = shaped(*GROWING)
    state = state_after_trial(setup, {28: 0.3, 38: 0.2, 36: 0.1})
    wider = state.alternatives[WIDER].tensors[2]
    np.testing.assert_array_equal(wider["2.up.weight"][:, :8], 5.0)
    np.testing.assert_array_equal(wider["2.up.weight"][:, 8:], 0.0)
    np.testing.assert_array_equal(wider["2.down.weight"][:8], 5.0)
    np.testing.assert_array_equal(wider["2.down.weight"][8:], 1.0)
    deeper = state.alternatives[DEEPER].tensors
    np.testing.assert_array_equal(deeper[1]["1.up.weight"], 0.0)
    np.testing.assert_array_equal(deeper[3]["3.up.weight"], 5.0)


def doubled(counts: StepCounts) -> StepCounts:
    """The counts with twice the FLOPs in every part."""

    def twice(block: BlockCounts) -> BlockCounts:
        return replace(
            block, forward_flops=2 * block.forward_flops, backward_flops=2 * block.backward_flops
        )

    return replace(counts, blocks=tuple(map(twice, counts.blocks)), rest=twice(counts.rest))


def test_fedadapter_groups_take_equal_modelled_time() -> None:
    """The deeper group costs twice as much as the others here, and takes half of the steps."""
    setup = shaped(*GROWING, "training.local_steps=10")
    assert setup.clock is not None
    twice = Arithmetic(tuple(map(doubled, ARITHMETIC.counts)))

    def arithmetic(spec: AdapterSpec) -> Any:
        return twice if sum(layer is not None for layer in spec.layers) == 3 else ARITHMETIC

    setup = replace(setup, clock=make_clock(setup.clock.fleet, arithmetic))
    instructions = METHODS["fedadapter"].instruct(
        setup, METHODS["fedadapter"].init(setup), 1, [0, 1, 2]
    )
    steps = {len(layers_of(instruction)): instruction.budget.steps for instruction in instructions}
    assert steps == {2: 10, 3: 5}


# Centralised


def test_centralised_is_one_client_with_the_steps_of_a_cohort() -> None:
    config = load_config(None, ["method=centralised", "clients=20", "cohort_size=5", "quorum=3"])
    adjust = METHODS["centralised"].adjust
    single = adjust(config)
    assert (single.clients, single.cohort_size, single.quorum, single.drawn) == (1, 1, 1, 1)
    assert single.training.local_steps == 5 * (config.training.local_steps or 0)
    assert adjust(single) == single
    assert single.clock.profiles == ("datacentre_gpu",)
    assert METHODS["fedlora"].adjust(config) == config


def test_centralised_trains_on_the_rows_of_all_clients(
    tiny_overrides: list[str], tmp_path: Any
) -> None:
    other = [word for word in tiny_overrides if not word.startswith("dropout.")]
    config = load_config(None, [*other, "method=centralised"])
    result = start_run(config, tmp_path / "run", Recorder())
    assert (result["clients"], result["cohort_size"]) == (1, 1)
    [row, *_] = rows_of(tmp_path / "run" / "clients.jsonl")
    # Two steps of two clients, on all rows but those for validation and test.
    assert row["steps"] == 4
    [rows] = partition_rows(
        np.zeros(result["train_rows"], dtype=np.int64), None, 1, config.partition, config.seed
    )
    assert len(rows.train) > 0.75 * result["train_rows"]


# Local


def test_local_sends_all_values_once_and_shares_none() -> None:
    setup, method = setup_for("method=local"), METHODS["local"]
    state = method.init(setup)
    instructions = method.instruct(setup, state, 1, [0, 1])
    assert all(
        instruction.state_round is None and len(instruction.tensors) == LAYERS + 1
        for instruction in instructions
    )
    replies = [update_for(instructions[0]), Failure(1, "asleep")]
    assert all(not reply.tensors for reply in replies if isinstance(reply, Update))
    state = method.merge(setup, state, instructions, replies)
    first, second, third = method.instruct(setup, state, 2, [0, 1, 2])
    assert (first.state_round, first.tensors) == (1, {})
    assert second.state_round is third.state_round is None
    assert not any(instruction.share for instruction in (first, second, third))
    evaluation = method.evaluate_client(setup, state, 2, 0)
    assert (evaluation.state_round, evaluation.tensors) == (1, {})
    assert (evaluation.evaluate_only, evaluation.budget.steps) == (True, 0)


def test_a_local_client_that_lost_its_state_gets_all_values_again() -> None:
    setup, method = setup_for("method=local"), METHODS["local"]
    state = method.init(setup)
    instructions = method.instruct(setup, state, 1, [0, 1])
    state = method.merge(
        setup, state, instructions, [update_for(instruction) for instruction in instructions]
    )
    instructions = method.instruct(setup, state, 2, [0, 1])
    lost = [Failure(0, "it is gone", lost=True), Failure(1, "asleep")]
    state = method.merge(setup, state, instructions, lost)
    again, other = method.instruct(setup, state, 3, [0, 1])
    assert (again.state_round, len(again.tensors)) == (None, LAYERS + 1)
    assert (other.state_round, other.tensors) == (1, {})
