"""Decide whether an Update may be merged: nothing a device sends is taken on trust."""

from collections.abc import Mapping

import numpy as np

from droppeft.plans import Array, LayerKey, Plan, Update, flatten


def why_refused(plan: Plan, update: Update) -> str | None:
    """Return what is wrong with an Update as one sentence, or ``None`` if it may be merged.

    Checked: it answers this Plan (round, device, nonce), names only tensors that may travel, with
    the planned shapes and types, all values and the loss are finite, and its counts add up.
    """
    checks = (_identity(plan, update), _counts(plan, update), _tensors(plan, update))
    return next((reason for reason in checks if reason is not None), None)


def _identity(plan: Plan, update: Update) -> str | None:
    if (update.round, update.device) != (plan.round, plan.device):
        return f"answers round {update.round}, device {update.device}"
    return None if update.nonce == plan.nonce else "does not carry this Plan's nonce"


def _counts(plan: Plan, update: Update) -> str | None:
    layers = len(plan.adapter.layers)
    if len(update.active_steps) != layers or len(update.importance) != layers:
        return f"speaks of {len(update.active_steps)} layers, the model has {layers}"
    if update.examples < 1 or update.steps < 1:
        return "trained on nothing"
    if not all(0 <= active <= update.steps for active in update.active_steps):
        return "claims more active steps than steps"
    numbers = (update.train_loss, update.reward or 0.0, *update.importance)
    return None if np.isfinite(numbers).all() else "its loss, reward or importance is not finite"


def _tensors(plan: Plan, update: Update) -> str | None:
    planned: Mapping[tuple[LayerKey, str], Array] = {
        (key, name): array for key, name, array in flatten(plan.tensors)
    }
    for key, name, array in flatten(update.tensors):
        if (key, name) not in planned or name not in plan.share:
            return f"sends {name}, which it was not asked for"
        expected = planned[key, name]
        if array.shape != expected.shape or array.dtype != expected.dtype:
            return f"sends {name} as {array.dtype}{list(array.shape)}"
        if not np.isfinite(array).all():
            return f"sends {name} with values that are not finite"
    return None
