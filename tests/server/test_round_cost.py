"""The modelled clock decides which updates are merged and how long a round takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.config import load_config
from droppeft.costs.device_profiles import PROFILES, Fleet
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.messages.instruction import AdapterSpec, Instruction
from droppeft.messages.reply import Failure, Reply, Update
from droppeft.messages.server_state import ServerState
from droppeft.methods import METHODS, Setup
from droppeft.models.loading import load_backbone
from droppeft.runs.ledger import ClosedRound
from droppeft.server import round_cost
from droppeft.server.resume import resume_run
from droppeft.server.round_cost import close_round, count_rows, make_clock
from droppeft.server.rounds import draw_cohort, run_round
from droppeft.server.run import Interrupted, start_run
from droppeft.transports.flower.wire_format import pack_reply, unpack_reply
from handmade import ARITHMETIC, COST, REST, Scripted, instruction_for, setup_for, update_for
from runs import Recorder, outcome, rows_of

METHOD = METHODS["fedlora"]

# A token takes one modelled second in the forward and backward pass, and sending takes no time.
PROFILE = {
    "effective_flops_per_s": 2.0 * REST,
    "memory_bytes": 1,
    "idle_watts": 1,
    "train_watts": 10,
    "download": 1e30,
    "upload": 1e30,
}
WORDS = (
    "clock.profiles=own",
    *(f"clock.custom.own.{key}={value}" for key, value in PROFILE.items()),
)


def setup_with(*words: str) -> Setup:
    return setup_for("method=fedlora", *WORDS, *words)


def taking(instruction: Instruction, seconds: int, **changes: Any) -> Update:
    """An update whose training takes this many modelled seconds; no layer ran, only the rest."""
    cost = replace(COST, tokens=seconds, rows=1, layer_tokens=(0,) * 4)
    return update_for(instruction, examples=1, active_steps=(0,) * 4, cost=cost, **changes)


def closed_with(seconds: list[int | None], *words: str) -> tuple[list[Reply], Any]:
    """Close a round with one client per entry; ``None`` is a client that failed."""
    setup = setup_with(*words)
    instructions = [instruction_for(client) for client in range(len(seconds))]
    checked: list[Reply] = [
        Failure(instruction.client, "lost") if took is None else taking(instruction, took)
        for instruction, took in zip(instructions, seconds, strict=True)
    ]
    return close_round(setup.clock, setup.config, instructions, checked)


def merged(replies: list[Reply]) -> list[int]:
    return [reply.client for reply in replies if isinstance(reply, Update)]


def test_a_round_lasts_as_long_as_its_slowest_client() -> None:
    replies, cost = closed_with([30, 50, 40])
    assert merged(replies) == [0, 1, 2]
    assert cost.round_s == pytest.approx(50)
    assert [client.total_s for client in cost.clients] == pytest.approx([30, 50, 40])
    assert cost.energy_j == pytest.approx(10 * 120)
    assert (cost.late, cost.surplus, cost.absent) == ((), (), ())


def test_without_a_clock_everybody_is_merged() -> None:
    instructions = [instruction_for(client) for client in range(3)]
    checked: list[Reply] = [
        taking(instructions[0], 5),
        Failure(1, "lost"),
        taking(instructions[2], 9),
    ]
    replies, cost = close_round(None, setup_for().config, instructions, checked)
    assert replies == checked
    assert (cost.clients, cost.round_s, cost.energy_j) == ((None, None, None), None, None)


def test_nobody_waits_for_a_client_that_failed() -> None:
    replies, cost = closed_with([30, None, 40])
    assert replies[1] == Failure(1, "lost")
    assert cost.clients[1] is None
    assert cost.round_s == pytest.approx(40)


def test_late_updates_are_not_merged_and_the_round_lasts_until_the_deadline() -> None:
    replies, cost = closed_with([30, 50, 40], "clock.deadline_s=45.0")
    assert merged(replies) == [0, 2]
    assert replies[1] == Failure(1, "late: it took 50.0 modelled s, the deadline is 45 s")
    assert (cost.round_s, cost.late) == (45, (1,))
    assert cost.energy_j == pytest.approx(10 * 120)


def test_the_deadline_itself_is_in_time() -> None:
    replies, cost = closed_with([30, 50, 40], "clock.deadline_s=50.0")
    assert (merged(replies), cost.late) == ([0, 1, 2], ())


def test_all_are_late() -> None:
    replies, cost = closed_with([30, 50, 40], "clock.deadline_s=10.0")
    assert (merged(replies), cost.round_s) == ([], 10)


def test_the_fastest_of_an_over_selected_round_are_merged_in_instruction_order() -> None:
    seconds: list[int | None] = [70, 20, 60, 30, 10]
    replies, cost = closed_with(seconds, "clock.over_selection=1.5")
    assert merged(replies) == [1, 3, 4]
    assert replies[0] == Failure(0, "surplus: it took 70.0 modelled s, and 3 others were faster")
    assert (cost.round_s, cost.surplus, cost.late) == (pytest.approx(30), (0, 2), ())
    assert cost.energy_j == pytest.approx(10 * 190)


def test_a_full_cohort_waits_for_no_deadline() -> None:
    words = ("clock.over_selection=1.5", "clock.deadline_s=65.0")
    _, cost = closed_with([70, 20, 60, 30, 10], *words)
    assert (cost.round_s, cost.surplus, cost.late) == (pytest.approx(30), (2,), (0,))


def test_equal_times_are_told_apart_by_their_place_among_the_instructions() -> None:
    replies, cost = closed_with([20, 20, 20, 20, 20], "clock.over_selection=1.5")
    assert merged(replies) == [0, 1, 2]
    assert cost.surplus == (3, 4)


def test_the_clock_reads_the_same_from_a_message() -> None:
    setup, instruction = setup_for(), instruction_for(4)
    assert setup.clock is not None
    update = update_for(instruction, cost=replace(COST, reward_tokens=7))
    came = unpack_reply(pack_reply(update), 10_000)
    assert isinstance(came, Update)
    assert setup.clock.client_cost(instruction, came) == setup.clock.client_cost(
        instruction, update
    )


def test_a_round_without_clients() -> None:
    replies, cost = closed_with([])
    assert (replies, cost.clients, cost.round_s, cost.energy_j) == ([], (), 0.0, 0)


@given(st.lists(st.none() | st.integers(1, 100), max_size=5), st.none() | st.integers(1, 100))
def test_what_closes_a_round(seconds: list[int | None], deadline: int | None) -> None:
    words = [] if deadline is None else [f"clock.deadline_s={deadline}.5"]
    replies, cost = closed_with(seconds, "clock.over_selection=1.5", *words)
    # The deadlines lie between the times, so that rounding does not matter.
    done = [took for took in seconds if took and (deadline is None or took < deadline + 0.5)]
    assert sorted(seconds[client] or 0 for client in merged(replies)) == sorted(done)[:3]
    assert len(merged(replies)) + len(cost.late) + len(cost.surplus) == sum(
        took is not None for took in seconds
    )
    if cost.late and len(done) < 3:
        assert cost.round_s == (deadline or 0) + 0.5
    else:
        assert cost.round_s == pytest.approx(max(sorted(done)[:3], default=0))


# In a round


def run(
    setup: Setup, *, backwards: bool = False, round: int = 1
) -> tuple[ServerState, ClosedRound]:
    transport = Scripted(
        lambda instruction: [
            taking(instruction, 10 + 7 * instruction.client % 50, tensors=trained(instruction))
        ],
        backwards=backwards,
    )
    return run_round(setup, METHOD, transport, METHOD.init(setup), round, lambda reply: None)


def trained(instruction: Instruction) -> Any:
    """The tensors of an update in which no layer ran: the head."""
    return {
        "head": {"head.W": instruction.tensors["head"]["head.W"] * 0 + float(instruction.client)}
    }


def head(state: ServerState) -> float:
    return float(state.model.tensors["head"]["head.W"][0])


def test_a_round_draws_more_than_it_merges() -> None:
    setup = setup_with("clock.over_selection=2.0", "server.clip_norm_multiple=0")
    state, closed = run(setup)
    assert len(closed.instructions) == len(draw_cohort(setup, 1)) == 6
    fastest = sorted(
        (10 + 7 * instruction.client % 50, instruction.client)
        for instruction in closed.instructions
    )[:3]
    assert {update.client for update in closed.accepted} == {client for _, client in fastest}
    assert head(state) == pytest.approx(sum(client for _, client in fastest) / 3)
    assert all(isinstance(reply, Update) for reply in closed.checked_replies)


def test_the_order_of_arrival_decides_nothing() -> None:
    setup = setup_with("clock.over_selection=2.0", "clock.deadline_s=40.0")
    (state, closed), (other, backwards) = run(setup), run(setup, backwards=True)
    assert head(state) == head(other)
    assert closed.modelled == backwards.modelled
    assert [update.client for update in closed.accepted] == [
        update.client for update in backwards.accepted
    ]


def test_a_refused_update_has_no_modelled_cost() -> None:
    setup = setup_with()
    transport = Scripted(lambda instruction: [taking(instruction, 5, nonce="an old one")])
    _, closed = run_round(setup, METHOD, transport, METHOD.init(setup), 1, lambda reply: None)
    assert closed.modelled.clients == (None, None, None)
    assert closed.modelled.round_s == 0


def test_a_quorum_counts_updates_that_were_in_time() -> None:
    setup = setup_with("clock.deadline_s=1.0", "quorum=2")
    state, closed = run(setup)
    assert closed.accepted == ()
    assert head(state) == 1.0
    assert closed.modelled.round_s == 1.0


def test_an_absent_client_gets_no_instruction_and_is_recorded() -> None:
    setup = setup_with("clock.custom.own.availability=0.5")
    rounds = [run(setup, round=round)[1] for round in range(1, 21)]
    for round, closed in enumerate(rounds, start=1):
        asked = [instruction.client for instruction in closed.instructions]
        assert sorted([*asked, *closed.modelled.absent]) == list(draw_cohort(setup, round))
    # 60 draws at one half: standard deviation 3.9.
    assert abs(sum(len(closed.modelled.absent) for closed in rounds) - 30) < 20


def test_all_clients_may_be_absent() -> None:
    setup = setup_with("clock.custom.own.availability=1e-9")
    state, closed = run(setup)
    assert (closed.instructions, closed.accepted, closed.modelled.round_s) == ((), (), 0.0)
    assert len(closed.modelled.absent) == 3
    assert head(state) == 1.0


def test_an_adapter_is_counted_once() -> None:
    counted: list[AdapterSpec] = []

    def count(spec: AdapterSpec) -> Any:
        counted.append(spec)
        return ARITHMETIC

    clock = make_clock(Fleet(0, ("own",) * 5, {"own": PROFILES["phone"]}), count)
    for client in range(5):
        instruction = instruction_for(client)
        clock.client_cost(instruction, update_for(instruction))
    assert len(counted) == 1


@pytest.mark.full
def test_equal_models_of_two_runs_are_counted_once(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_cost, "_COUNTED", {})

    def count(*words: str) -> Any:
        config = load_config(None, [*tiny_overrides, *words])
        backbone = load_backbone(config.model, ("no", "yes"), config.seed)
        spec = adapter_spec(config.adapter, backbone.num_layers, config.frozen.count)
        return count_rows(backbone, config.task, spec, config.training)

    first = count()
    assert count("seed=5", "training.local_steps=3", "data=elsewhere") is first
    for different in ("training.max_length=8", "training.batch_size=3", "adapter.rank=1"):
        assert count(different) != first
    monkeypatch.setattr(round_cost, "_COUNTED", {})
    assert count() == first


def test_an_unknown_profile_stops_before_anything_is_loaded(tmp_path: Path) -> None:
    words = ["clock.profiles=jetson", "data=no-such-data", "model=no-such-model"]
    with pytest.raises(DroppeftError, match="unknown profile 'jetson'"):
        start_run(load_config(None, words), tmp_path / "run", Recorder())
    assert list(tmp_path.iterdir()) == []


# In a run


@pytest.fixture(scope="module")
def clock_words(tiny_overrides: list[str]) -> list[str]:
    """Three of four clients are drawn, two are merged, and phones are often absent."""
    more = ("rounds=4", "clock.over_selection=1.5", "clock.profiles=phone,jetson_tx2")
    return [*tiny_overrides, *more]


@pytest.fixture(scope="module")
def clock_run(clock_words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clock") / "run"
    start_run(load_config(None, clock_words), out, Recorder())
    return out


def test_rows_of_a_run_agree_with_each_other(clock_run: Path) -> None:
    rounds, clients = (rows_of(clock_run / name) for name in ("rounds.jsonl", "clients.jsonl"))
    for row in rounds:
        trained = [each for each in clients if each["round"] == row["round"]]
        assert [each["client"] for each in trained] == row["cohort"]
        assert row["accepted"] + len(row["surplus"]) == len(row["cohort"])
        assert len(row["cohort"]) + len(row["absent"]) == 3
        merged = [each["client_modelled_s"] for each in trained if each["accepted"]]
        surplus = [each["client_modelled_s"] for each in trained if not each["accepted"]]
        assert row["round_modelled_s"] == max(merged)
        assert all(took >= max(merged) for took in surplus)
        assert row["energy_modelled_j"] == sum(each["energy_modelled_j"] for each in trained)
    assert any(row["surplus"] for row in rounds)
    assert any(row["absent"] for row in rounds)
    result = json.loads((clock_run / "result.json").read_text())
    assert result["round_modelled_s"] == sum(row["round_modelled_s"] for row in rounds)


def test_a_client_has_the_same_profile_in_all_rounds(clock_run: Path) -> None:
    kinds: dict[int, set[str]] = {}
    for row in rows_of(clock_run / "clients.jsonl"):
        kinds.setdefault(row["client"], set()).add(row["profile"])
    assert all(len(names) == 1 for names in kinds.values())
    assert set.union(*kinds.values()) == {"phone", "jetson_tx2"}


def test_a_resumed_run_has_the_modelled_clock_of_an_unbroken_one(
    clock_words: list[str], clock_run: Path, tmp_path: Path
) -> None:
    class Stopped(Recorder):
        def round_done(self, row: Any) -> None:
            super().round_done(row)
            if row.round == 2:
                raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        start_run(load_config(None, clock_words), out, Stopped())
    resume_run(out, Recorder())
    assert outcome(out) == outcome(clock_run)


def test_layers_that_were_dropped_cost_no_modelled_time(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    def train_s(mean: float) -> dict[tuple[int, int], float]:
        out = tmp_path / str(mean)
        words = [*tiny_overrides, "rounds=1", f"dropout.mean={mean}"]
        start_run(load_config(None, words), out, Recorder())
        rows = rows_of(out / "clients.jsonl")
        return {(row["round"], row["client"]): row["train_modelled_s"] for row in rows}

    full, half = train_s(0.0), train_s(0.5)
    assert full.keys() == half.keys()
    assert all(half[key] < full[key] for key in full)


def test_a_deadline_that_nobody_can_meet_ends_a_run(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    words = [*tiny_overrides, "clock.deadline_s=1e-6"]
    with pytest.raises(DroppeftError, match=r"client \d took longer than clock\.deadline_s on the"):
        start_run(load_config(None, words), tmp_path / "run", Recorder())


def test_clients_that_are_never_available_end_a_run(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    words = [*tiny_overrides, *WORDS, "clock.custom.own.availability=1e-9"]
    with pytest.raises(DroppeftError, match="no client was available, by the availability"):
        start_run(load_config(None, words), tmp_path / "run", Recorder())


# A model whose arithmetic depends on values


@pytest.fixture
def uncountable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise DroppeftError("the costs of this model cannot be counted")

    monkeypatch.setattr(round_cost, "stored_counts", refuse)
    monkeypatch.setattr(round_cost, "_COUNTED", {})


@pytest.mark.usefixtures("uncountable")
def test_a_model_that_cannot_be_counted_is_trained_without_a_clock(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = start_run(load_config(None, [*tiny_overrides, "rounds=1"]), out, Recorder())
    assert result["no_clock_reason"] == "the costs of this model cannot be counted"
    assert (result["round_modelled_s"], result["energy_modelled_j"]) == (None, None)
    [row] = rows_of(out / "rounds.jsonl")
    assert (row["accepted"], row["round_modelled_s"]) == (2, None)
    assert all("client_modelled_s" not in each for each in rows_of(out / "clients.jsonl"))


@pytest.mark.usefixtures("uncountable")
@pytest.mark.parametrize("word", ["clock.deadline_s=9.0", "clock.over_selection=1.5"])
def test_settings_that_need_a_clock_are_refused_without_one(
    tiny_overrides: list[str], tmp_path: Path, word: str
) -> None:
    with pytest.raises(
        DroppeftError, match="need a modelled clock: the costs of this model cannot be"
    ):
        start_run(load_config(None, [*tiny_overrides, word]), tmp_path / "run", Recorder())
    assert list(tmp_path.iterdir()) == []
