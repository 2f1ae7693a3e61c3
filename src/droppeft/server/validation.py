"""Validate what clients send, before anything of it is merged."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, replace
from typing import Any

import numpy as np

from droppeft.layer_dropout.modes import Mode
from droppeft.messages.instruction import Instruction, modes_of
from droppeft.messages.reply import EvaluationReply, Failure, Reply, Update
from droppeft.messages.tensors import HEAD, OTHER, Layout, flatten
from droppeft.sharing.criteria import CRITERIA
from droppeft.sharing.selection import count_of, unchanged_shared
from droppeft.tasks.task import Task

MAX_REWARD, MAX_IMPORTANCE = 1e6, 1e30
"""Larger rewards and gradient norms are refused: no model has them, and they would mislead the
configurator."""


def why_refused(instruction: Instruction, update: Update, layout: Layout, task: Task) -> str | None:
    """Return in one sentence why an update may not be merged, or ``None`` if it may.

    These conditions are checked:

    - The update replies to this instruction: it has its round, client and nonce.
    - Its counts fit the instruction's budget, because they are its weight in the mean.
    - Its costs are possible and agree with the counts.
    - It holds exactly the tensors that may be sent, of layers that it trained and that it shares.
    - The tensors have the shapes of the instruction's adapter.
    - All numbers are finite.

    Args:
        instruction: what the client was asked to do.
        update: the client's reply.
        layout: the tensors of the instruction's adapter.
        task: what is learnt.
    """
    return (
        why_not_its_own(instruction, update)
        or _wrong_counts(instruction, update)
        or _wrong_targets(update, task)
        or _wrong_cost(instruction, update)
        or _wrong_choice(instruction, update, layout)
        or _wrong_names(instruction, update, layout)
        or _wrong_values(update, layout)
    )


def check_reply(
    instruction: Instruction,
    reply: Reply | None,
    why_not: Callable[[Update | EvaluationReply], str | None],
) -> Reply:
    """Return the reply to an instruction, or a failure if it is missing or refused.

    A failure gets the client of the instruction, whichever client it names itself. State can be
    lost only by a client that the instruction expects to have saved some.

    Args:
        reply: ``None`` if nothing arrived.
        why_not: returns why a reply that is no failure must be refused, or ``None``.
    """
    if reply is None:
        return Failure(instruction.client, "sent no reply")
    if isinstance(reply, Failure):
        lost = reply.lost and instruction.state_round is not None
        return replace(reply, client=instruction.client, lost=lost)
    reason = why_not(reply)
    return reply if reason is None else Failure(instruction.client, f"refused: {reason}")


def why_not_its_own(instruction: Instruction, reply: Update | EvaluationReply) -> str | None:
    """Return why a reply does not belong to an instruction, or ``None`` if it does."""
    if (reply.round, reply.client) != (instruction.round, instruction.client):
        return f"replies to round {reply.round}, client {reply.client}"
    return None if reply.nonce == instruction.nonce else "does not carry this instruction's nonce"


def _wrong_counts(instruction: Instruction, update: Update) -> str | None:
    layers, batch_size = len(instruction.adapter.layers), instruction.training.batch_size
    for values in (update.active_steps, update.importance):
        if len(values) != layers:
            return f"has values for {len(values)} layers, the model has {layers}"
    if update.steps < 1 or (instruction.budget.steps or update.steps) != update.steps:
        return f"took {update.steps} steps, the budget is {instruction.budget.steps or 'above 0'}"
    if update.examples == 0:
        return "trained on nothing: in every step fp16 overflowed; use training.precision=bf16"
    if not 1 <= update.examples <= update.steps * batch_size:
        return f"claims {update.examples} rows in {update.steps} steps of at most {batch_size}"
    if not all(0 <= active <= update.steps for active in update.active_steps):
        return "claims that a layer was trained in more steps than there were"
    if not np.isfinite((update.train_loss, update.reward or 0.0, *update.importance)).all():
        return (
            "its loss, reward or gradients are not finite: training diverges; lower "
            f"training.learning_rate={instruction.training.learning_rate:g}"
        )
    if abs(update.reward or 0.0) > MAX_REWARD or not all(
        0 <= importance < MAX_IMPORTANCE for importance in update.importance
    ):
        return "claims an impossible reward or importance"
    return None


def _wrong_targets(update: Update, task: Task) -> str | None:
    """Check the weight of an update: its rows, or at most its tokens."""
    if task.rows_are_targets:
        fits = update.targets == update.examples
    else:
        fits = update.examples <= update.targets <= update.cost.tokens
    return None if fits else f"claims {update.targets} targets in {update.examples} rows"


def _wrong_cost(instruction: Instruction, update: Update) -> str | None:
    cost = update.cost
    # An integer may be larger than any float; the modelled clock divides by these numbers.
    if not all(0 <= number < 2**63 for number in _numbers(astuple(cost))):
        return "claims impossible costs"
    most_rows = update.steps * instruction.training.batch_size
    if not update.examples <= cost.rows <= min(cost.tokens, most_rows):
        return f"claims {cost.tokens} tokens in {cost.rows} rows for {update.examples} examples"
    may_score = (
        instruction.sharing is not None
        and CRITERIA[instruction.sharing.criterion].runs_model != "no"
    )
    if (cost.scoring_tokens and not may_score) or (
        cost.reward_tokens and not instruction.reward_rows
    ):
        return "claims to have measured what it was not asked to measure"
    expected = (update.steps, cost.tokens) if instruction.personal_adapter is not None else (0, 0)
    if (cost.personal_steps, cost.personal_tokens) != expected:
        return f"claims {cost.personal_steps} steps with a personal adapter, not {expected[0]}"
    return _wrong_tokens(instruction, update)


def _wrong_tokens(instruction: Instruction, update: Update) -> str | None:
    """Check the tokens of each layer against the steps in which it was trained, and its modes."""
    cost, layers = update.cost, len(instruction.adapter.layers)
    for tokens_by_layer in (cost.layer_tokens, cost.forward_tokens):
        if len(tokens_by_layer) != layers:
            return f"has tokens for {len(tokens_by_layer)} layers, the model has {layers}"
    shares = modes_of(instruction).shares()
    for layer, (active, trained, forward) in enumerate(
        zip(update.active_steps, cost.layer_tokens, cost.forward_tokens, strict=True)
    ):
        if (trained and not shares[Mode.TRAIN][layer]) or (
            forward and not shares[Mode.FORWARD][layer]
        ):
            return f"claims to have run layer {layer} as it was not asked to"
        least = cost.tokens if active == update.steps else min(active, 1)
        if not least <= trained <= cost.tokens - forward:
            return (
                f"claims {trained} of {cost.tokens} tokens in layer {layer}, "
                f"which was trained in {active} steps"
            )
    return None


def _numbers(values: Iterable[Any]) -> Iterator[float]:
    """Yield the numbers of nested tuples."""
    for value in values:
        if isinstance(value, tuple):
            yield from _numbers(value)
        else:
            yield value


def _wrong_choice(instruction: Instruction, update: Update, layout: Layout) -> str | None:
    """Check the client's choice of shared layers against the instruction's rule."""
    rule, shared, scores = instruction.sharing, update.shared, update.scores
    if rule is None:
        if (shared, scores) == (None, None):
            return None
        return "chooses layers, which it was not asked to do"
    if shared is None or scores is None or len(scores) != len(instruction.adapter.layers):
        return "does not say which layers it shares and how all layers scored"
    layers = {key for key, _ in layout.values() if isinstance(key, int)}
    moved = {
        int(key)
        for name, (key, _) in layout.items()
        if key in layers and (instruction.train is None or name in instruction.train)
        if update.active_steps[int(key)] > 0
    }
    count = count_of(rule.fraction, len(moved))
    if list(shared) != sorted(layers.intersection(shared)) or len(moved & {*shared}) != count:
        return f"does not share {count} of the layers that it trained"
    if {*shared} - moved != unchanged_shared(sorted(layers), moved, rule.shared):
        return "changes what is shared of layers that it did not train"
    if not all(np.isfinite(score) and abs(score) < MAX_IMPORTANCE for score in scores):
        return "claims impossible scores"
    return None


def _wrong_names(instruction: Instruction, update: Update, layout: Layout) -> str | None:
    sent = {(key, name) for key, name, _ in flatten(update.tensors)}
    expected = {
        (key, name)
        for name, (key, _) in layout.items()
        if name in instruction.share
        and (key in (HEAD, OTHER) or _trained_and_shared(update, int(key)))
    }
    for _, name in sorted(sent - expected, key=str):
        return f"sends {name}, which it may not send or did not train"
    for _, name in sorted(expected - sent, key=str):
        return f"lacks {name}"
    return None


def _trained_and_shared(update: Update, layer: int) -> bool:
    return update.active_steps[layer] > 0 and (update.shared is None or layer in update.shared)


def _wrong_values(update: Update, layout: Layout) -> str | None:
    for _, name, array in flatten(update.tensors):
        if array.shape != layout[name][1] or array.dtype != np.float32:
            return f"sends {name} as {array.dtype}{list(array.shape)}"
        if not np.isfinite(array).all():
            return f"sends {name} with values that are not finite"
    return None
