"""One round: which clients are drawn, which are merged, and what is recorded about the others."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.config import TrainingConfig
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Update
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import HEAD
from droppeft.methods import METHODS, Setup
from droppeft.runs.ledger import ClosedRound, RoundEvaluation, client_row, round_row
from droppeft.server.rounds import draw_cohort, run_round
from droppeft.transports.base import Arrival
from handmade import LAYERS, Scripted, assert_same, setup_for, update_for

SETUP = setup_for("method=fedlora")
METHOD = METHODS["fedlora"]
COHORT = [4, 5, 8]


@dataclass(frozen=True)
class Noted:
    """A memory with types that JSON does not have."""

    by_client: Mapping[int, tuple[float, ...]]
    seen: frozenset[int]


def run(transport: Any, seen: list[Any] | None = None) -> tuple[ServerState, ClosedRound]:
    replies: list[Any] = [] if seen is None else seen
    return run_round(SETUP, METHOD, transport, METHOD.init(SETUP), 1, replies.append)


class Shuffled:
    """Clients send random layers with values of all magnitudes, in a given order."""

    def __init__(self, order: list[int], seed: int) -> None:
        self.order, self.seed = order, seed

    def exchange(self, instructions: Any) -> Any:
        arrivals = {}
        for index, instruction in enumerate(instructions):
            values = np.random.default_rng((self.seed, index))
            ran = tuple(int(one) for one in values.integers(0, 3, LAYERS))
            tensors = {
                key: {
                    name: (values.normal(size=array.shape) * 10 ** values.uniform(-6, 6)).astype(
                        "f4"
                    )
                    for name, array in named.items()
                }
                for key, named in instruction.tensors.items()
                if key == HEAD or ran[key] > 0
            }
            update = update_for(instruction, active_steps=ran, tensors=tensors)
            cost = replace(update.cost, layer_tokens=tuple(32 * one for one in ran))
            examples = int(values.integers(1, 9))
            counts = {"examples": examples, "targets": examples}
            arrivals[index] = Arrival(index, replace(update, cost=cost, **counts))
        yield from (arrivals[index] for index in self.order)


@given(st.permutations(range(5)), st.integers(0, 2**32))
def test_the_order_of_arrival_does_not_change_a_bit(order: list[int], seed: int) -> None:
    setup = setup_for("method=fedlora", "cohort_size=5")
    (one, first), (other, second) = (
        run_round(setup, METHOD, Shuffled(places, seed), METHOD.init(setup), 1, lambda reply: None)
        for places in (list(range(5)), order)
    )
    assert len(first.accepted) == 5
    assert_same(one.model.tensors, other.model.tensors)
    assert first.modelled == second.modelled


def head(state: ServerState) -> float:
    return float(state.model.tensors["head"]["head.W"][0])


def in_epochs() -> Setup:
    """A setup in which clients train an epoch."""
    setup = setup_for("method=fedlora")
    training = TrainingConfig(local_steps=None, local_epochs=1, precision="fp32")
    return replace(setup, config=setup.config.model_copy(update={"training": training}))


def all_but(client: int, reply: Any) -> Scripted:
    """Every client sends tensors filled with its number, except one, which replies as given."""

    def answer(instruction: Instruction) -> list[Any]:
        return (
            reply(instruction)
            if instruction.client == client
            else [update_for(instruction, float(instruction.client))]
        )

    return Scripted(answer)


@pytest.fixture
def cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients 4, 5 and 8 are drawn."""
    monkeypatch.setattr("droppeft.server.rounds.draw_cohort", lambda setup, round: COHORT)


@pytest.mark.usefixtures("cohort")
class TestRound:
    def test_all_clients_reply(self) -> None:
        seen: list[Any] = []
        state, closed = run(
            Scripted(lambda instruction: [update_for(instruction, float(instruction.client))]), seen
        )
        assert head(state) == pytest.approx((4 + 5 + 8) / 3)
        assert [instruction.client for instruction in closed.instructions] == COHORT
        assert list(closed.replies) == seen == list(closed.accepted)
        assert closed.server_wall_s > 0

    @pytest.mark.parametrize(
        ("reply", "reason"),
        [
            (lambda instruction: [], "sent no reply"),
            (lambda instruction: [Failure(5, "ran out of battery")], "ran out of battery"),
            # A client that cannot read its instruction does not know its number.
            (
                lambda instruction: [Failure(-1, "cannot read its instruction")],
                "cannot read its instruction",
            ),
            (
                lambda instruction: [update_for(instruction, math.nan)],
                "refused: sends layer.0.A with values that are not finite",
            ),
            (
                lambda instruction: [update_for(instruction, 5.0, nonce="an old one")],
                "refused: does not carry this instruction's nonce",
            ),
        ],
    )
    def test_a_client_that_fails_is_not_merged_and_is_recorded(
        self, reply: Any, reason: str
    ) -> None:
        state, closed = run(all_but(5, reply))
        assert head(state) == pytest.approx((4 + 8) / 2)
        assert closed.replies[1] == Failure(5, reason)
        assert [update.client for update in closed.accepted] == [4, 8]
        row = row_of(closed)
        assert (row.cohort, row.accepted) == (COHORT, 2)
        assert row.failures == [{"client": 5, "reason": reason}]
        made = client_row(
            closed.instructions[1],
            closed.checked_replies[1],
            closed.replies[1],
            closed.modelled.clients[1],
        )
        assert made["reason"] == reason

    def test_a_client_that_claims_another_number_is_refused(self) -> None:
        def answer(instruction: Instruction) -> list[Any]:
            return [update_for(instruction, float(instruction.client), client=5)]

        state, closed = run(Scripted(answer))
        assert head(state) == 5.0
        assert [isinstance(reply, Failure) for reply in closed.replies] == [True, False, True]

    def test_the_memory_is_that_of_a_checkpoint(self) -> None:
        def merge(*_: Any) -> ServerState:
            return replace(METHOD.init(SETUP), memory=Noted({3: (1.0, 0.1)}, frozenset({2})))

        method, silent = replace(METHOD, merge=merge), Scripted(lambda instruction: [])
        state, _ = run_round(SETUP, method, silent, METHOD.init(SETUP), 1, print)
        assert state.memory == Noted({3: (1.0, 0.1)}, frozenset({2}))

    @pytest.mark.parametrize(("quorum", "merged"), [(1, 2), (2, 2), (3, 0)])
    def test_nothing_is_merged_below_the_quorum(self, quorum: int, merged: int) -> None:
        setup = setup_for("method=fedlora", f"quorum={quorum}")
        transport = all_but(5, lambda instruction: [Failure(5, "ran out of battery")])
        state, closed = run_round(setup, METHOD, transport, METHOD.init(setup), 1, print)
        assert len(closed.accepted) == merged
        assert head(state) == (pytest.approx((4 + 8) / 2) if merged else 1.0)
        assert closed.replies[1] == Failure(5, "ran out of battery")
        if not merged:
            reason = "set aside: 2 of the 3 updates that a round needs"
            assert closed.replies[2] == Failure(8, reason)

    @pytest.mark.parametrize("factor", [-100.0, 1e30])
    def test_an_update_of_any_size_moves_the_model_by_the_clients_share(
        self, factor: float
    ) -> None:
        """The changes are 3, 4 and the attacker's, which is scaled to the median of 4."""
        state, closed = run(all_but(8, lambda one: [update_for(one, 1 + 7 * factor)]))
        attack = math.copysign(4, factor)
        assert head(state) == pytest.approx(1 + (3 + 4 + attack) / 3)
        row = row_of(closed)
        assert (row.accepted, row.clipped, row.limited) == (3, [8], [])
        assert closed.clipped[8] == pytest.approx(4 / abs(7 * factor))
        assert closed.checked_replies[2] is not closed.replies[2]

    def test_an_inflated_count_counts_twice(self) -> None:
        setup = in_epochs()
        many = 10**9
        cost = {"rows": many, "tokens": many, "layer_tokens": (many,) * LAYERS}

        def claims(instruction: Instruction) -> list[Any]:
            update = update_for(instruction, 8.0, steps=many, examples=many)
            layers = (many,) * LAYERS
            return [replace(update, active_steps=layers, cost=replace(update.cost, **cost))]

        state, closed = run_round(setup, METHOD, all_but(8, claims), METHOD.init(setup), 1, print)
        assert head(state) == pytest.approx((4 + 5 + 2 * 8) / 4)
        assert row_of(closed).limited == [8]

    def test_updates_within_their_bounds_are_merged_as_they_are(self) -> None:
        unbounded = setup_for(
            "method=fedlora", "server.clip_norm_multiple=0", "server.max_weight_multiple=0"
        )
        seen: list[Any] = []
        state, closed = run(Scripted(lambda one: [update_for(one, 2 + one.client / 10)]), seen)
        assert all(reply is sent for reply, sent in zip(closed.replies, seen, strict=True))
        transport = Scripted(lambda one: [update_for(one, 2 + one.client / 10)])
        other, _ = run_round(unbounded, METHOD, transport, METHOD.init(unbounded), 1, print)
        assert_same(state.model.tensors, other.model.tensors)

    def test_a_merge_that_is_not_finite_is_refused(self) -> None:
        def merge(setup: Any, state: Any, instructions: Any, replies: Any) -> ServerState:
            merged = METHOD.merge(setup, state, instructions, replies)
            tensors = {
                key: {n: v * np.float32(3e38) for n, v in named.items()}
                for key, named in merged.model.tensors.items()
            }
            if not any(isinstance(reply, Update) for reply in replies):
                return merged
            return replace(merged, model=replace(merged.model, tensors=tensors))

        before = METHOD.init(SETUP)
        transport = Scripted(lambda one: [update_for(one, 5.0)])
        state, closed = run_round(SETUP, replace(METHOD, merge=merge), transport, before, 1, print)
        assert_same(state.model.tensors, before.model.tensors)
        row = row_of(closed)
        reason = "set aside: the round was refused, because its merged values are not finite"
        assert (row.accepted, row.failures[0]) == (0, {"client": 4, "reason": reason})

    @pytest.mark.parametrize(("rule", "kept"), [("krum", [4]), ("multi_krum", [4, 5])])
    def test_updates_that_krum_sets_aside_are_in_the_row(self, rule: str, kept: list[int]) -> None:
        setup = setup_for("method=fedlora", f"server.merge={rule}", "server.clip_norm_multiple=0")
        transport = Scripted(lambda one: [update_for(one, float(one.client))])
        _, closed = run_round(setup, METHOD, transport, METHOD.init(setup), 1, print)
        row = row_of(closed)
        assert [update.client for update in closed.accepted] == kept
        assert row.set_aside == [client for client in COHORT if client not in kept]
        assert row.failures == []

    @pytest.mark.parametrize("rule", ["mean", "median", "multi_krum"])
    def test_who_points_against_the_others_is_left_out_and_stays_out(
        self, rule: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In round 3 client 9 agrees, which does not outweigh two rounds in which it did not."""
        monkeypatch.setattr("droppeft.server.rounds.draw_cohort", lambda *_: range(20))
        setup = setup_for("method=fedlora", "clients=20", "cohort_size=20", f"server.merge={rule}")
        state = METHOD.init(setup)
        for value, of_client_9 in ((5.0, -3.0), (6.0, -3.0), (7.0, 7.0)):
            sent = {**dict.fromkeys(range(20), value), 9: of_client_9}
            transport = Scripted(lambda one, sent=sent: [update_for(one, sent[one.client])])
            state, closed = run_round(setup, METHOD, transport, state, 1, print)
            row = row_of(closed)
            assert (row.opposed, row.failures) == ([9], [])
            assert 9 not in [update.client for update in closed.accepted]
            assert head(state) == value
        assert state.agreement[9] < 0 < state.agreement[8]

    def test_krum_chooses_among_those_who_are_not_left_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nine colluders are nearest to each other, and point against the eleven others."""
        monkeypatch.setattr("droppeft.server.rounds.draw_cohort", lambda *_: range(20))
        krum = ("server.merge=krum", "server.malicious_fraction=0.4")
        setup = setup_for("method=fedlora", "clients=20", "cohort_size=20", *krum)
        transport = Scripted(
            lambda one: [update_for(one, -3.0 if one.client > 10 else 4.0 + 3 * one.client)]
        )
        state, closed = run_round(setup, METHOD, transport, METHOD.init(setup), 1, print)
        assert row_of(closed).opposed == list(range(11, 20))
        assert [update.client <= 10 for update in closed.accepted] == [True]
        assert head(state) > 1.0

    def test_a_robust_rule_needs_three_updates(self) -> None:
        setup = setup_for("method=fedlora", "server.merge=median")
        transport = all_but(5, lambda instruction: [])
        state, closed = run_round(setup, METHOD, transport, METHOD.init(setup), 1, print)
        assert (head(state), closed.accepted) == (1.0, ())

    def test_no_client_replies(self) -> None:
        state, closed = run(Scripted(lambda instruction: []))
        assert head(state) == 1.0
        row = row_of(closed)
        assert (row.accepted, len(row.failures), row.upload_bytes) == (0, 3, 0)
        assert row.train_loss is None
        assert row.mean_active_layers is None
        assert row.layer_steps == []


def row_of(closed: ClosedRound) -> Any:
    return round_row(closed, RoundEvaluation({"global_accuracy": 0.5}), 0.0, 0.0)


def test_a_cohort_is_reproducible_and_has_no_client_twice() -> None:
    for round in range(1, 50):
        drawn = list(draw_cohort(SETUP, round))
        assert drawn == list(draw_cohort(SETUP, round)) == sorted(set(drawn))
        assert len(drawn) == 3
        assert set(drawn) <= set(range(10))


def test_cohorts_follow_seed_and_round() -> None:
    other = setup_for("method=fedlora", "seed=1")
    rounds = range(1, 20)
    assert len({tuple(draw_cohort(SETUP, round)) for round in rounds}) > 10
    assert [draw_cohort(SETUP, round) for round in rounds] != [
        draw_cohort(other, round) for round in rounds
    ]


def test_every_client_is_drawn_about_equally_often() -> None:
    rounds = 2000
    drawn = Counter(client for round in range(rounds) for client in draw_cohort(SETUP, round))
    # Each is in a cohort with probability 0.3: 600 of 2000, standard deviation 20.5.
    counts = np.array([drawn[client] for client in range(10)])
    assert np.abs(counts - 600).max() < 5 * 20.5


def test_the_cohort_may_be_everybody() -> None:
    everybody = setup_for("cohort_size=10")
    assert list(draw_cohort(everybody, 1)) == list(range(10))
