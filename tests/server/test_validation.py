"""Every reason for which an Update is refused, one by one."""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from droppeft.messages import SharingRule
from droppeft.server.validation import why_refused
from handmade import COST, answer_to, filled, instruction_for, layout

PLAN = instruction_for(share=frozenset({"head.W", "layer.0.A", "layer.1.A"}))
SHARED = {key: filled(5.0)[key] for key in (0, 1, "head")}


def said_of(**changes: Any) -> str | None:
    """What is said of an Update that is in order but for some changes."""
    update = answer_to(PLAN, **{"tensors": SHARED, **changes})
    return why_refused(PLAN, update, layout(PLAN.adapter))


def with_layer_0(array: Any) -> dict[str, Any]:
    return {"tensors": {**SHARED, 0: {"layer.0.A": array}}}


def with_layer_tokens(*tokens: int) -> dict[str, Any]:
    return {"cost": replace(COST, layer_tokens=tokens)}


def test_tokens_of_steps_that_were_skipped_are_accepted() -> None:
    """They count in rows and tokens, but not in examples and active steps."""
    assert said_of(examples=4, **with_layer_tokens(64, 32, 64, 64)) is None


def test_the_tokens_of_a_frozen_layer_are_counted_elsewhere() -> None:
    instruction = replace(PLAN, frozen=1, share=PLAN.share - {"layer.0.A"})
    update = answer_to(instruction, tensors={key: SHARED[key] for key in (1, "head")})
    idle = replace(update, **with_layer_tokens(0, 32, 32, 64))
    assert why_refused(instruction, idle, layout(instruction.adapter)) is None


def test_an_update_that_is_in_order_is_accepted() -> None:
    assert said_of() is None


def test_a_measured_reward_is_accepted() -> None:
    assert said_of(reward=-0.25) is None


def test_a_layer_that_never_ran_is_not_sent() -> None:
    without = {key: named for key, named in SHARED.items() if key != 1}
    assert said_of(active_steps=(2, 0, 1, 2), tensors=without) is None
    assert said_of(active_steps=(2, 0, 1, 2)) == (
        "sends layer.1.A, which it was not asked for or did not train"
    )


def test_a_tensor_that_the_instruction_did_not_send_may_come_back() -> None:
    """A layer that a client decides to share is not in what it was sent."""
    kept = {key: named for key, named in PLAN.tensors.items() if key != 1}
    instruction = replace(PLAN, tensors=kept)
    update = answer_to(instruction, tensors=SHARED)
    assert why_refused(instruction, update, layout(instruction.adapter)) is None


RULED = replace(PLAN, sharing=SharingRule("gradient_norm", 0.25, 0.0, 8, None))
CHOSEN = {
    "shared": (1,),
    "scores": (0.4, 0.3, 0.2, 0.1),
    "tensors": {key: SHARED[key] for key in (1, "head")},
}


FIRST = {"tensors": {key: SHARED[key] for key in (0, "head")}}


def said_of_choice(**changes: Any) -> str | None:
    update = answer_to(RULED, **{**CHOSEN, **changes})
    return why_refused(RULED, update, layout(RULED.adapter))


def test_a_client_s_choice_of_layers_is_accepted() -> None:
    """Also of a layer that may not travel in this turn; what never ran stays shared."""
    head = {"head": SHARED["head"]}
    assert said_of_choice() is None
    assert said_of_choice(shared=(3,), tensors=head) is None
    assert said_of_choice(shared=(0, 1), active_steps=(2, 0, 1, 2), **FIRST) is None
    before = replace(RULED, sharing=replace(RULED.sharing, shared=(3,)))  # type: ignore[type-var]
    update = answer_to(before, **{**CHOSEN, **FIRST, "shared": (0,), "active_steps": (2, 0, 1, 2)})
    assert why_refused(before, update, layout(PLAN.adapter)) is None


def test_what_a_turn_does_not_train_stays_what_it_was() -> None:
    """A quarter of the two layers that are trained is one, and the others are shared."""
    names = frozenset({"head.W", "layer.1.A", "layer.3.A"})
    instruction = replace(RULED, train=names, share=names)
    update = answer_to(instruction, **{**CHOSEN, "shared": (0, 1, 2)})
    assert why_refused(instruction, update, layout(PLAN.adapter)) is None
    greedy = replace(update, shared=(0, 1))
    said = why_refused(instruction, greedy, layout(PLAN.adapter))
    assert said == "chooses about layers that it did not move"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shared": None}, "does not say which layers it shares"),
        ({"scores": None}, "does not say which layers it shares"),
        ({"scores": (0.1, 0.2, 0.3)}, "does not say which layers it shares"),
        ({"shared": ()}, "of the layers that it moved"),
        ({"shared": (0, 1)}, "of the layers that it moved"),
        ({"shared": (4,)}, "of the layers that it moved"),
        ({"shared": (-1,)}, "of the layers that it moved"),
        ({"shared": (1, 1)}, "of the layers that it moved"),
        ({"scores": (0.1, math.nan, 0.3, 0.4)}, "claims impossible scores"),
        ({"scores": (0.1, -1e31, 0.3, 0.4)}, "claims impossible scores"),
        ({"shared": (0,)}, "sends layer.1.A, which it was not asked for"),
        ({"tensors": SHARED}, "sends layer.0.A, which it was not asked for"),
        ({"tensors": {"head": SHARED["head"]}}, "lacks layer.1.A"),
        ({"shared": (0, 1), **FIRST}, "of the layers that it moved"),
        (
            {"shared": (0,), "active_steps": (2, 0, 1, 2), **FIRST},
            "chooses about layers that it did not move",
        ),
        ({"cost": replace(COST, scoring_tokens=-1)}, "claims impossible costs"),
        ({"cost": replace(COST, scoring_tokens=8)}, "measured what it was not asked for"),
        ({"cost": replace(COST, reward_tokens=8)}, "measured what it was not asked for"),
        ({"cost": replace(COST, personal_steps=2)}, "claims 2 steps with an adapter of its own"),
    ],
)
def test_a_choice_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(said_of_choice(**changes))


def test_a_choice_that_nobody_asked_for_is_refused() -> None:
    assert said_of(shared=(0, 1), scores=(0.0,) * 4) == "chooses layers, and was not asked to"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 2}, "answers round 2, client 3"),
        ({"client": 4}, "answers round 1, client 4"),
        ({"nonce": "another"}, "does not carry this instruction's nonce"),
        ({"active_steps": (2, 1, 1)}, "speaks of 3 layers, the model has 4"),
        ({"importance": (0.0,) * 5}, "speaks of 5 layers, the model has 4"),
        ({"examples": 0}, "trained on nothing: in every step fp16 overflowed"),
        ({"examples": 33}, "claims 33 rows in 2 steps of 16 at most"),
        ({"steps": 0, "active_steps": (0,) * 4}, "took 0 steps, the budget says 2"),
        ({"steps": 3}, "took 3 steps, the budget says 2"),
        ({"tensors": {}}, "lacks head.W"),
        ({"tensors": {key: SHARED[key] for key in (0, "head")}}, "lacks layer.1.A"),
        ({"active_steps": (2, 3, 1, 2)}, "claims more active steps than steps"),
        ({"active_steps": (2, -1, 1, 2)}, "claims more active steps than steps"),
        ({"train_loss": math.nan}, "its loss, reward or importance is not finite"),
        ({"reward": math.inf}, "its loss, reward or importance is not finite"),
        ({"reward": math.nan}, "its loss, reward or importance is not finite"),
        ({"reward": -1e7}, "claims an impossible gain or importance"),
        ({"importance": (0.0, 0.0, -0.1, 0.0)}, "claims an impossible gain or importance"),
        ({"importance": (0.0, 0.0, 1e31, 0.0)}, "claims an impossible gain or importance"),
        ({"importance": (0.0, 0.0, math.nan, 0.0)}, "its loss, reward or importance is not finite"),
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
            "speaks of tokens in 3 layers, the model has 4",
        ),
        (with_layer_tokens(64, 32, 65, 64), "claims 65 of 64 tokens in layer 2, active 1 times"),
        (with_layer_tokens(64, 0, 32, 64), "claims 0 of 64 tokens in layer 1, active 1 times"),
        (with_layer_tokens(63, 32, 32, 64), "claims 63 of 64 tokens in layer 0, active 2 times"),
        (with_layer_tokens(64, -1, 32, 64), "claims impossible costs"),
        ({"tensors": {0: {"unheard.of": np.zeros(2, np.float32)}}}, "sends unheard.of, which it"),
        ({"tensors": {**SHARED, 2: filled(5.0)[2]}}, "sends layer.2.A, which it was not asked for"),
        ({"tensors": {**SHARED, 1: filled(5.0)[0]}}, "sends layer.0.A, which it was not asked for"),
        (with_layer_0(np.zeros(3, np.float32)), r"sends layer.0.A as float32\[3\]"),
        (with_layer_0(np.zeros((1, 2), np.float32)), r"sends layer.0.A as float32\[1, 2\]"),
        (with_layer_0(np.zeros(2, np.float64)), r"sends layer.0.A as float64\[2\]"),
        (with_layer_0(np.array([0, math.nan], np.float32)), "values that are not finite"),
        (with_layer_0(np.array([-math.inf, 0], np.float32)), "values that are not finite"),
    ],
)
def test_an_update_is_refused(changes: dict[str, Any], reason: str) -> None:
    said = said_of(**changes)
    assert said is not None
    assert re.search(reason, said)
