"""Every reason for which an update is refused, one by one."""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from droppeft.messages.instruction import SharingRule
from droppeft.messages.reply import Failure
from droppeft.server.validation import check_reply, why_refused
from droppeft.tasks.classification import ClassificationTask
from handmade import COST, filled, instruction_for, layout, update_for

TASK = ClassificationTask()

INSTRUCTION = instruction_for(share=frozenset({"head.W", "layer.0.A", "layer.1.A"}))
SHARED = {key: filled(5.0)[key] for key in (0, 1, "head")}


def reason_for(**changes: Any) -> str | None:
    """The reason for refusing an update that is valid except for some changes."""
    update = update_for(INSTRUCTION, **{"tensors": SHARED, **changes})
    return why_refused(INSTRUCTION, update, layout(INSTRUCTION.adapter), TASK)


def with_layer_0(array: Any) -> dict[str, Any]:
    return {"tensors": {**SHARED, 0: {"layer.0.A": array}}}


def with_layer_tokens(*tokens: int) -> dict[str, Any]:
    return {"cost": replace(COST, layer_tokens=tokens)}


def test_tokens_of_steps_that_were_skipped_are_accepted() -> None:
    """Such steps count in rows and tokens, but not in examples and active steps."""
    assert reason_for(examples=4, **with_layer_tokens(64, 32, 64, 64)) is None


def test_a_layer_is_run_only_as_the_instruction_asks() -> None:
    """Its modes say which layers may be trained and which may run forward only."""
    instruction = replace(INSTRUCTION, starts=(1, 2), share=INSTRUCTION.share - {"layer.0.A"})
    update = update_for(
        instruction,
        active_steps=(0, 1, 1, 2),
        tensors={key: SHARED[key] for key in (1, "head")},
    )

    def reason(layer_tokens: tuple[int, ...], forward_tokens: tuple[int, ...]) -> str | None:
        cost = replace(COST, layer_tokens=layer_tokens, forward_tokens=forward_tokens)
        claimed = replace(update, cost=cost)
        return why_refused(instruction, claimed, layout(instruction.adapter), TASK)

    assert reason((0, 32, 32, 64), (64, 32, 0, 0)) is None
    for trained, forward in (((64, 32, 32, 64), (0,) * 4), ((0, 32, 32, 64), (64, 32, 1, 0))):
        assert "as it was not asked to" in str(reason(trained, forward))
    assert "claims 33 of 64 tokens in layer 1" in str(reason((0, 33, 32, 64), (64, 32, 0, 0)))
    assert "has tokens for 3 layers" in str(reason((0, 32, 32, 64), (64, 32, 0)))


def test_a_valid_update_is_accepted() -> None:
    assert reason_for() is None


def test_a_measured_reward_is_accepted() -> None:
    assert reason_for(reward=-0.25) is None


def test_a_layer_that_never_ran_is_not_sent() -> None:
    without = {key: named for key, named in SHARED.items() if key != 1}
    assert reason_for(active_steps=(2, 0, 1, 2), tensors=without) is None
    assert reason_for(active_steps=(2, 0, 1, 2)) == (
        "sends layer.1.A, which it may not send or did not train"
    )


def test_a_tensor_that_the_instruction_did_not_send_may_come_back() -> None:
    """A client may choose to share a layer whose values were not in the instruction."""
    sent = {key: named for key, named in INSTRUCTION.tensors.items() if key != 1}
    instruction = replace(INSTRUCTION, tensors=sent)
    update = update_for(instruction, tensors=SHARED)
    assert why_refused(instruction, update, layout(instruction.adapter), TASK) is None


CHOOSING = replace(INSTRUCTION, sharing=SharingRule("gradient_norm", 0.25, 0.0, None))
CHOSEN = {
    "shared": (1,),
    "scores": (0.4, 0.3, 0.2, 0.1),
    "tensors": {key: SHARED[key] for key in (1, "head")},
}


FIRST = {"tensors": {key: SHARED[key] for key in (0, "head")}}


def reason_for_choice(**changes: Any) -> str | None:
    update = update_for(CHOOSING, **{**CHOSEN, **changes})
    return why_refused(CHOOSING, update, layout(CHOOSING.adapter), TASK)


def test_a_client_s_choice_of_layers_is_accepted() -> None:
    """Also of a layer that may not be sent in this round; what never ran stays shared."""
    head = {"head": SHARED["head"]}
    assert reason_for_choice() is None
    assert reason_for_choice(shared=(3,), tensors=head) is None
    assert reason_for_choice(shared=(0, 1), active_steps=(2, 0, 1, 2), **FIRST) is None
    before = replace(CHOOSING, sharing=replace(CHOOSING.sharing, shared=(3,)))  # type: ignore[type-var]
    update = update_for(before, **{**CHOSEN, **FIRST, "shared": (0,), "active_steps": (2, 0, 1, 2)})
    assert why_refused(before, update, layout(INSTRUCTION.adapter), TASK) is None


def test_layers_that_were_not_trained_stay_shared() -> None:
    """A quarter of the two trained layers is one; the layers that are not trained are shared."""
    names = frozenset({"head.W", "layer.1.A", "layer.3.A"})
    instruction = replace(CHOOSING, train=names, share=names)
    tokens = replace(COST, layer_tokens=(0, 32, 32, 64), forward_tokens=(64, 0, 0, 0))
    trained = {"active_steps": (0, 1, 1, 2), "cost": tokens}
    update = update_for(instruction, **{**CHOSEN, **trained, "shared": (0, 1, 2)})
    assert why_refused(instruction, update, layout(INSTRUCTION.adapter), TASK) is None
    greedy = replace(update, shared=(0, 1))
    said = why_refused(instruction, greedy, layout(INSTRUCTION.adapter), TASK)
    assert said == "changes what is shared of layers that it did not train"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shared": None}, "does not say which layers it shares"),
        ({"scores": None}, "does not say which layers it shares"),
        ({"scores": (0.1, 0.2, 0.3)}, "does not say which layers it shares"),
        ({"shared": ()}, "of the layers that it trained"),
        ({"shared": (0, 1)}, "of the layers that it trained"),
        ({"shared": (4,)}, "of the layers that it trained"),
        ({"shared": (-1,)}, "of the layers that it trained"),
        ({"shared": (1, 1)}, "of the layers that it trained"),
        ({"scores": (0.1, math.nan, 0.3, 0.4)}, "claims impossible scores"),
        ({"scores": (0.1, -1e31, 0.3, 0.4)}, "claims impossible scores"),
        ({"shared": (0,)}, "sends layer.1.A, which it may not send"),
        ({"tensors": SHARED}, "sends layer.0.A, which it may not send"),
        ({"tensors": {"head": SHARED["head"]}}, "lacks layer.1.A"),
        ({"shared": (0, 1), **FIRST}, "of the layers that it trained"),
        (
            {"shared": (0,), "active_steps": (2, 0, 1, 2), **FIRST},
            "changes what is shared of layers that it did not train",
        ),
        ({"cost": replace(COST, scoring_tokens=-1)}, "claims impossible costs"),
        ({"cost": replace(COST, scoring_tokens=8)}, "measured what it was not asked to measure"),
        ({"cost": replace(COST, reward_tokens=8)}, "measured what it was not asked to measure"),
        (
            {"cost": replace(COST, personal_steps=2)},
            "claims 2 steps with a personal adapter, not 0",
        ),
    ],
)
def test_a_choice_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(reason_for_choice(**changes))


def test_a_choice_that_nobody_asked_for_is_refused() -> None:
    assert (
        reason_for(shared=(0, 1), scores=(0.0,) * 4)
        == "chooses layers, which it was not asked to do"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 2}, "replies to round 2, client 3"),
        ({"client": 4}, "replies to round 1, client 4"),
        ({"nonce": "another"}, "does not carry this instruction's nonce"),
        ({"active_steps": (2, 1, 1)}, "has values for 3 layers, the model has 4"),
        ({"importance": (0.0,) * 5}, "has values for 5 layers, the model has 4"),
        ({"examples": 0}, "trained on nothing: in every step fp16 overflowed"),
        ({"examples": 33}, "claims 33 rows in 2 steps of at most 16"),
        ({"targets": 9}, "claims 9 targets in 8 rows"),
        ({"targets": 7}, "claims 7 targets in 8 rows"),
        ({"targets": 0}, "claims 0 targets in 8 rows"),
        ({"steps": 0, "active_steps": (0,) * 4}, "took 0 steps, the budget is 2"),
        ({"steps": 3}, "took 3 steps, the budget is 2"),
        ({"tensors": {}}, "lacks head.W"),
        ({"tensors": {key: SHARED[key] for key in (0, "head")}}, "lacks layer.1.A"),
        ({"active_steps": (2, 3, 1, 2)}, "trained in more steps than there were"),
        ({"active_steps": (2, -1, 1, 2)}, "trained in more steps than there were"),
        (
            {"train_loss": math.nan},
            "its loss, reward or gradients are not finite: training diverges",
        ),
        ({"reward": math.inf}, "its loss, reward or gradients are not finite: training diverges"),
        ({"reward": math.nan}, "its loss, reward or gradients are not finite: training diverges"),
        ({"reward": -1e7}, "claims an impossible reward or importance"),
        ({"importance": (0.0, 0.0, -0.1, 0.0)}, "claims an impossible reward or importance"),
        ({"importance": (0.0, 0.0, 1e31, 0.0)}, "claims an impossible reward or importance"),
        (
            {"importance": (0.0, 0.0, math.nan, 0.0)},
            "its loss, reward or gradients are not finite: training diverges",
        ),
        ({"cost": replace(COST, total_wall_s=math.inf)}, "claims impossible costs"),
        ({"cost": replace(COST, reward_wall_s=math.nan)}, "claims impossible costs"),
        ({"cost": replace(COST, tokens=-1)}, "claims impossible costs"),
        ({"cost": replace(COST, reward_tokens=10**400)}, "claims impossible costs"),
        ({"cost": replace(COST, rows=7)}, "claims 64 tokens in 7 rows for 8 examples"),
        ({"cost": replace(COST, rows=65)}, "claims 64 tokens in 65 rows for 8 examples"),
        (
            {"cost": replace(COST, rows=33, tokens=66, layer_tokens=(66, 32, 32, 66))},
            "claims 66 tokens in 33 rows for 8 examples",
        ),
        (
            {"cost": replace(COST, layer_tokens=(64, 32, 32))},
            "has tokens for 3 layers, the model has 4",
        ),
        (
            with_layer_tokens(64, 32, 65, 64),
            "claims 65 of 64 tokens in layer 2, which was trained in 1 steps",
        ),
        (
            with_layer_tokens(64, 0, 32, 64),
            "claims 0 of 64 tokens in layer 1, which was trained in 1 steps",
        ),
        (
            with_layer_tokens(63, 32, 32, 64),
            "claims 63 of 64 tokens in layer 0, which was trained in 2 steps",
        ),
        (with_layer_tokens(64, -1, 32, 64), "claims impossible costs"),
        ({"tensors": {0: {"unheard.of": np.zeros(2, np.float32)}}}, "sends unheard.of, which it"),
        ({"tensors": {**SHARED, 2: filled(5.0)[2]}}, "sends layer.2.A, which it may not send"),
        ({"tensors": {**SHARED, 1: filled(5.0)[0]}}, "sends layer.0.A, which it may not send"),
        (with_layer_0(np.zeros(3, np.float32)), r"sends layer.0.A as float32\[3\]"),
        (with_layer_0(np.zeros((1, 2), np.float32)), r"sends layer.0.A as float32\[1, 2\]"),
        (with_layer_0(np.zeros(2, np.float64)), r"sends layer.0.A as float64\[2\]"),
        (with_layer_0(np.array([0, math.nan], np.float32)), "values that are not finite"),
        (with_layer_0(np.array([-math.inf, 0], np.float32)), "values that are not finite"),
    ],
)
def test_an_update_is_refused(changes: dict[str, Any], reason: str) -> None:
    said = reason_for(**changes)
    assert said is not None
    assert re.search(reason, said)


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (7, "claims 7 targets in 8 rows"),
        (8, None),
        (64, None),
        (65, "claims 65 targets in 8 rows"),
        (-1, "claims -1 targets in 8 rows"),
    ],
)
def test_tokens_that_are_targets_are_no_more_than_the_tokens(
    targets: int, reason: str | None
) -> None:
    """Each of the 8 rows has a token that is learnt, and the update computed 64 tokens."""

    class ByToken(ClassificationTask):
        rows_are_targets = False

    update = update_for(INSTRUCTION, tensors=SHARED, targets=targets)
    assert why_refused(INSTRUCTION, update, layout(INSTRUCTION.adapter), ByToken()) == reason


def test_only_saved_state_can_be_lost() -> None:
    """A client that was to have saved nothing cannot make the server look for its state."""
    lost = Failure(9, "it is gone", lost=True)
    without, with_state = instruction_for(3), instruction_for(3, state_round=1)
    assert check_reply(without, lost, lambda reply: None) == Failure(3, "it is gone")
    assert check_reply(with_state, lost, lambda reply: None) == Failure(3, "it is gone", lost=True)
