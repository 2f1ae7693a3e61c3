"""Decide whether an Update may be merged: nothing a client sends is taken on trust."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, replace
from typing import Any

import numpy as np

from droppeft.messages import (
    HEAD,
    OTHER,
    Failure,
    Instruction,
    Layout,
    Measurement,
    Reply,
    Update,
    flatten,
)
from droppeft.sharing.criteria import CRITERIA
from droppeft.sharing.selection import count_of, unmoved

MOST_GAIN, MOST_IMPORTANCE = 1e6, 1e30
"""What clients say of these steers arms: no larger loss or norm of gradients is one of a model."""


def why_refused(instruction: Instruction, update: Update, layout: Layout) -> str | None:
    """Return what is wrong with an Update as one sentence, or ``None`` if it may be merged.

    Checked: it answers this instruction (round, client, nonce); its counts fit the instruction's
        budget, since
    they are its weight; its costs are possible and agree with the counts; it holds exactly the
    tensors that may travel, of layers that it says it shares and that ran, with the shapes of the
    instruction's adapter; and every number in it is finite.

    Args:
        plan: what was asked.
        update: what came back.
        layout: the tensors of the instruction's adapter.
    """
    return (
        why_not_its_own(instruction, update)
        or _counts(instruction, update)
        or _cost(instruction, update)
        or _choice(instruction, update, layout)
        or _names(instruction, update, layout)
        or _values(update, layout)
    )


def checked(
    instruction: Instruction,
    reply: Reply | None,
    why_not: Callable[[Update | Measurement], str | None],
) -> Reply:
    """What came for an instruction, or the Failure that it is; whoever it says it is from.

    Args:
        reply: ``None`` if nothing came.
        why_not: what is wrong with an answer that is no Failure.
    """
    if reply is None:
        return Failure(instruction.client, "sent no reply")
    if isinstance(reply, Failure):
        return replace(reply, client=instruction.client)
    reason = why_not(reply)
    return reply if reason is None else Failure(instruction.client, f"refused: {reason}")


def why_not_its_own(instruction: Instruction, answer: Update | Measurement) -> str | None:
    """What is wrong if an answer is to another instruction."""
    if (answer.round, answer.client) != (instruction.round, instruction.client):
        return f"answers round {answer.round}, client {answer.client}"
    return None if answer.nonce == instruction.nonce else "does not carry this instruction's nonce"


def _counts(instruction: Instruction, update: Update) -> str | None:
    layers, batch_size = len(instruction.adapter.layers), instruction.training.batch_size
    for said in (len(update.active_steps), len(update.importance)):
        if said != layers:
            return f"speaks of {said} layers, the model has {layers}"
    if update.steps < 1 or (instruction.budget.steps or update.steps) != update.steps:
        return f"took {update.steps} steps, the budget says {instruction.budget.steps}"
    if update.examples == 0:
        return "trained on nothing: in every step fp16 overflowed; use training.precision=bf16"
    if not 1 <= update.examples <= update.steps * batch_size:
        return f"claims {update.examples} rows in {update.steps} steps of {batch_size} at most"
    if not all(0 <= active <= update.steps for active in update.active_steps):
        return "claims more active steps than steps"
    numbers = (update.train_loss, update.reward or 0.0, *update.importance)
    if not np.isfinite(numbers).all():
        return "its loss, reward or importance is not finite"
    if abs(update.reward or 0.0) > MOST_GAIN or not all(
        0 <= one < MOST_IMPORTANCE for one in update.importance
    ):
        return "claims an impossible gain or importance"
    return None


def _cost(instruction: Instruction, update: Update) -> str | None:
    cost, layers, most_rows = (
        update.cost,
        len(instruction.adapter.layers),
        instruction.training.batch_size,
    )
    # A whole number may be larger than any float; the modelled clock divides by these.
    if not all(0 <= number < 2**63 for number in _numbers(astuple(cost))):
        return "claims impossible costs"
    if not update.examples <= cost.rows <= min(cost.tokens, update.steps * most_rows):
        return f"claims {cost.tokens} tokens in {cost.rows} rows for {update.examples} examples"
    measured = (
        instruction.sharing is not None
        and CRITERIA[instruction.sharing.criterion].runs_model != "no"
    )
    if (cost.scoring_tokens and not measured) or (
        cost.reward_tokens and not instruction.reward_rows
    ):
        return "claims to have measured what it was not asked for"
    if (cost.personal_steps, cost.personal_tokens) != (
        (0, 0) if instruction.personal_adapter is None else (update.steps, cost.tokens)
    ):
        return f"claims {cost.personal_steps} steps with an adapter of its own"
    if len(cost.layer_tokens) != layers:
        return f"speaks of tokens in {len(cost.layer_tokens)} layers, the model has {layers}"
    for layer in range(instruction.frozen, layers):
        ran, tokens = update.active_steps[layer], cost.layer_tokens[layer]
        least = cost.tokens if ran == update.steps else min(ran, 1)
        if not least <= tokens <= cost.tokens:
            return f"claims {tokens} of {cost.tokens} tokens in layer {layer}, active {ran} times"
    return None


def _numbers(values: Iterable[Any]) -> Iterator[float]:
    for value in values:
        if isinstance(value, tuple):
            yield from _numbers(value)
        else:
            yield value


def _choice(instruction: Instruction, update: Update, layout: Layout) -> str | None:
    rule, shared, scores = instruction.sharing, update.shared, update.scores
    if rule is None:
        return None if (shared, scores) == (None, None) else "chooses layers, and was not asked to"
    if shared is None or scores is None or len(scores) != len(instruction.adapter.layers):
        return "does not say which layers it shares, and how all scored"
    layers = {key for key, _ in layout.values() if isinstance(key, int)}
    moved = {
        int(key)
        for name, (key, _) in layout.items()
        if key in layers and (instruction.train is None or name in instruction.train)
        if update.active_steps[int(key)] > 0
    }
    count = count_of(rule.fraction, len(moved))
    if list(shared) != sorted(layers.intersection(shared)) or len(moved & {*shared}) != count:
        return f"does not share {count} of the layers that it moved"
    if {*shared} - moved != unmoved(sorted(layers), moved, rule.shared):
        return "chooses about layers that it did not move"
    if not all(np.isfinite(one) and abs(one) < MOST_IMPORTANCE for one in scores):
        return "claims impossible scores"
    return None


def _names(instruction: Instruction, update: Update, layout: Layout) -> str | None:
    sent = {(key, name) for key, name, _ in flatten(update.tensors)}
    expected = {
        (key, name)
        for name, (key, _) in layout.items()
        if name in instruction.share and (key in (HEAD, OTHER) or _ran_and_shared(update, int(key)))
    }
    for _, name in sorted(sent - expected, key=str):
        return f"sends {name}, which it was not asked for or did not train"
    for _, name in sorted(expected - sent, key=str):
        return f"lacks {name}"
    return None


def _ran_and_shared(update: Update, layer: int) -> bool:
    return update.active_steps[layer] > 0 and (update.shared is None or layer in update.shared)


def _values(update: Update, layout: Layout) -> str | None:
    for _, name, array in flatten(update.tensors):
        if array.shape != layout[name][1] or array.dtype != np.float32:
            return f"sends {name} as {array.dtype}{list(array.shape)}"
        if not np.isfinite(array).all():
            return f"sends {name} with values that are not finite"
    return None
