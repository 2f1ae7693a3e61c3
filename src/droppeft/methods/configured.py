"""The configurator on a run: which arms a round has, and what its turns have shown. Ours."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from droppeft import seeds
from droppeft.adapters.types import TYPES
from droppeft.configurator import (
    Arm,
    Asked,
    Scored,
    Trial,
    candidates,
    choose_together,
    neighbours,
    per_second,
    score,
)
from droppeft.configurator.memory import (
    Memory,
    as_json,
    begin,
    from_json,
    halved,
    refreshed,
    with_round,
)
from droppeft.methods.arm_costs import (
    check_fits,
    depth_of_run,
    fits_somewhere,
    fitting,
    is_deciding,
    of_kinds,
    seconds_of,
    unfitted,
    usual_seconds,
)
from droppeft.methods.base import Setup
from droppeft.methods.gains import gains_of
from droppeft.plans import Plan, Reply, ServerState, Update, first_trained_layer

KEY, LAST = "configurator", "last_arms"
STEP = 0.125
"""Of the mean drop rate, between neighbours."""


def is_fixed(setup: Setup) -> bool:
    """Whether nothing is to be found out."""
    return setup.config.configurator.policy == "fixed"


def first_memory(setup: Setup, state: ServerState) -> ServerState:
    """The state with all candidates, none tried.

    Raises:
        DroppeftError: no candidate is possible, none fits some device, or there is no clock.
    """
    settings = setup.config.configurator
    found = candidates(settings.means, settings.shapes, _prefixes(setup), depth_of_run(setup))
    memory = begin(found, setup.config.training.max_length / 2)
    check_fits(setup, state, memory)
    possible = [arm for arm in found if fits_somewhere(setup, state, memory, arm, 1)]
    return _with_memory(state, begin(possible, memory.row_length), {})


def _prefixes(setup: Setup) -> Sequence[float]:
    """A prompt stands before the first layer: everything behind it has a backward."""
    layered = TYPES[setup.config.adapter.type].kind == "layered"
    return setup.config.configurator.prefixes if layered else (0.0,)


def memory_of(state: ServerState) -> Memory:
    """What is remembered."""
    tree = state.memory[KEY]
    assert isinstance(tree, Mapping)
    return from_json(tree)


def arms_of_round(
    setup: Setup, state: ServerState, round: int, cohort: Sequence[int]
) -> list[tuple[int, Arm]]:
    """An arm and its number for every device, from the state, the round and the cohort alone."""
    settings, memory = setup.config.configurator, memory_of(state)
    if not cohort:
        return []
    rng = seeds.numpy_generator(setup.config.seed, purpose="arms", round=round)
    common = (setup, state, memory, round)
    seconds = np.array(of_kinds(setup, cohort, lambda kind: seconds_of(*common, kind)))
    fits = np.array(of_kinds(setup, cohort, lambda kind: fitting(*common, kind)))
    if not settings.by_class:
        seconds = np.tile(usual_seconds(*common), (len(cohort), 1))
    fits = _in_time(fits, seconds, setup.config.clock.deadline_s)
    numbers = memory.numbers
    untried = np.array([number not in memory.tried for number in numbers])
    asked = Asked(seconds, fits, untried, settings.epsilon, rng)
    known = memory.known(settings.window)
    if is_deciding(setup, round):
        scored = score(settings.policy, known, asked)
    else:
        scored = Scored(np.tile(known.quality, (len(cohort), 1)), known.quality)
    places = choose_together(scored, seconds, fits)
    return [(numbers[place], memory.arms[numbers[place]]) for place in places]


def _in_time(
    fits: npt.NDArray[np.bool_], seconds: npt.NDArray[np.float64], deadline_s: float | None
) -> npt.NDArray[np.bool_]:
    """Arms that end by the deadline, on devices that have one."""
    if deadline_s is None:
        return fits
    ends = fits & (seconds <= deadline_s)
    return np.where(ends.any(axis=1, keepdims=True), ends, fits)


def learned(
    setup: Setup,
    before: ServerState,
    after: ServerState,
    plans: Sequence[Plan],
    replies: Sequence[Reply],
) -> ServerState:
    """The state after a round, with what its turns have shown; failures show nothing.

    Args:
        before: from which the Plans were made.
        after: with the merged model.
    """
    if not plans:
        return _with_memory(after, memory_of(before), {})
    settings, memory, round = setup.config.configurator, memory_of(before), plans[0].round
    given = arms_of_round(setup, before, round, [plan.device for plan in plans])
    gains = gains_of(setup, plans, replies)
    merged = [
        (plan, reply)
        for plan, reply in zip(plans, replies, strict=True)
        if isinstance(reply, Update)
    ]
    trials = [
        Trial(round, number, gain)
        for gain, (number, _) in zip(gains, given, strict=True)
        if gain is not None and is_deciding(setup, round)
    ]
    lengths = [update.cost.tokens / update.cost.rows for _, update in merged]
    memory = with_round(
        memory,
        trials,
        round,
        settings.window,
        fmean(lengths) if lengths else None,
        _importance(setup, merged) if merged else None,
        [number for number, _ in given] if is_deciding(setup, round) else (),
    )
    if is_deciding(setup, round):
        memory = _other_arms(setup, before, memory, round)
    return _with_memory(after, memory, _shown(setup, plans, replies, given, gains))


def _other_arms(setup: Setup, state: ServerState, memory: Memory, round: int) -> Memory:
    """Fewer, or one exchanged, as the policy has it; every kind of device has one that fits."""
    settings = setup.config.configurator
    seconds = usual_seconds(setup, state, memory, round)

    def suffice(numbers: Collection[int]) -> bool:
        left = {number: memory.arms[number] for number in numbers}
        return unfitted(setup, state, replace(memory, arms=left), round) is None

    def near(arm: Arm) -> list[Arm]:
        several = any(_prefixes(setup))
        depth = depth_of_run(setup)
        found = neighbours(arm, STEP, settings.shapes, depth, prefixes=several)
        return [one for one in found if fits_somewhere(setup, state, memory, one, round)]

    if settings.policy == "successive_halving":
        return halved(memory, round, settings.stage, settings.window, seconds, suffice)
    rng = seeds.numpy_generator(setup.config.seed, purpose="new arm", round=round)
    new = refreshed(memory, round, settings.refresh, settings.window, seconds, near, rng)
    stays = unfitted(setup, state, new, round) is not None
    return replace(memory, changed=new.changed) if stays else new


def _shown(
    setup: Setup,
    plans: Sequence[Plan],
    replies: Sequence[Reply],
    given: Sequence[tuple[int, Arm]],
    gains: Sequence[float | None],
) -> Mapping[str, Any]:
    """What people want to see of a round; nothing is decided by it."""
    rates = [plan.dropout.rates for plan in plans if plan.dropout]
    lowest = [first_trained_layer(plan) for plan in plans]
    return {
        "round": plans[0].round,
        "chosen": {
            str(plan.device): number for plan, (number, _) in zip(plans, given, strict=True)
        },
        "labels": {str(number): arm.label for number, arm in given},
        "rewards": {
            str(plan.device): gain
            for plan, reply, gain in zip(plans, replies, gains, strict=True)
            if isinstance(reply, Update)
        },
        "rates": [fmean(layer) for layer in zip(*rates, strict=True)],
        "trained": [fmean(layer >= lower for lower in lowest) for layer in range(setup.num_layers)],
    }


def note(setup: Setup, state: ServerState) -> Mapping[str, Any] | None:
    """What the configurator did in the last round and thinks now, for the ledger.

    ``chosen``: number of the arm of each device; ``rewards``: of those that were merged; ``rates``,
    ``trained``: of each layer, mean drop rate and share of the devices that trained it; ``labels``:
    of the arms' numbers, chosen or present; ``quality``, ``deviation``, ``trials``, ``seconds``: of
    the present arms, in units of the typical gain and modelled seconds of a turn, mean over the
    kinds of device; ``best``: number of the arm with most gain per second.
    """
    last = state.memory.get(LAST)
    if is_fixed(setup) or not isinstance(last, Mapping) or not last:
        return None
    memory = memory_of(state)
    known = memory.known(setup.config.configurator.window)
    seconds = usual_seconds(setup, state, memory, last["round"])
    worth = per_second(known.quality, np.array(seconds)).tolist()
    numbers = memory.numbers
    present = {str(number): arm.label for number, arm in memory.arms.items()}
    return {
        **last,
        "labels": {**last["labels"], **present},
        "present": list(numbers),
        "quality": [float(one) for one in known.quality],
        "deviation": [float(one) for one in known.deviation],
        "trials": [int(one) for one in known.count],
        "seconds": list(seconds),
        "best": numbers[worth.index(max(worth))],
    }


def _with_memory(state: ServerState, memory: Memory, last: Mapping[str, Any]) -> ServerState:
    return ServerState(
        state.model, state.alternatives, {**state.memory, KEY: as_json(memory), LAST: dict(last)}
    )


def _importance(setup: Setup, merged: Sequence[tuple[Plan, Update]]) -> list[float]:
    """Of each layer, mean over the turns that trained it; 0 where none did."""
    found = []
    for layer in range(setup.num_layers):
        seen = [
            update.importance[layer]
            for plan, update in merged
            if layer >= first_trained_layer(plan) and update.active_steps[layer] > 0
        ]
        found.append(fmean(seen) if seen else 0.0)
    return found
