"""The configurator on a run: what arms take on the clock, and what turns have shown; ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from droppeft import seeds
from droppeft.adapters.types import TYPES
from droppeft.config import DeviceProfile
from droppeft.configurator import (
    Arm,
    Asked,
    Trial,
    arm_rates,
    candidates,
    choose_together,
    first_trained,
    per_second,
    score,
)
from droppeft.configurator.arms import Depth
from droppeft.configurator.memory import (
    Memory,
    as_json,
    begin,
    from_json,
    halved,
    refreshed,
    with_round,
)
from droppeft.costs.clock import Arithmetic, Clock, compute_seconds
from droppeft.costs.devices import seconds_per_byte
from droppeft.costs.memory import VALUE_BYTES, most_active, step_memory
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import scheduled_rates
from droppeft.methods.base import Setup
from droppeft.plans import Plan, Reply, ServerState, Update, first_trained_layer, payload_bytes

KEY, LAST = "configurator", "last_arms"
SHAPES_OF_NEIGHBOURS, STEP = ("uniform", "incremental", "decay", "importance"), 0.125
USUAL_STEPS = 10
"""Steps of a turn that is said in epochs, whose number the server does not know."""


def is_fixed(setup: Setup) -> bool:
    """Whether nothing is to be found out."""
    return setup.config.configurator.policy == "fixed"


def depth_of_run(setup: Setup) -> Depth:
    """The layers that arms are about."""
    dropout = setup.config.dropout
    frozen = setup.config.frozen.layers
    return Depth(setup.num_layers, frozen, dropout.protect_first, dropout.protect_last)


def first_memory(setup: Setup, state: ServerState) -> ServerState:
    """The state with all candidates, none tried.

    Raises:
        DroppeftError: no candidate is possible, none fits some device, or there is no clock.
    """
    settings = setup.config.configurator
    # A prompt stands before the first layer: everything behind it has a backward.
    layered = TYPES[setup.config.adapter.type].kind == "layered"
    prefixes = settings.prefixes if layered else (0.0,)
    found = candidates(settings.means, settings.shapes, prefixes, depth_of_run(setup))
    memory = begin(found, setup.config.training.max_length / 2)
    _check_fits(setup, state, memory)
    return _with_memory(state, memory, {})


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
    seconds = np.array(_of_kinds(setup, cohort, lambda kind: _seconds(*common, kind)))
    fits = np.array(_of_kinds(setup, cohort, lambda kind: _fitting(*common, kind)))
    if not settings.by_class:
        seconds = np.tile(_usual_seconds(*common), (len(cohort), 1))
    fits = _in_time(fits, seconds, setup.config.clock.deadline_s)
    numbers = memory.numbers
    untried = np.array([number not in memory.tried for number in numbers])
    asked = Asked(seconds, fits, untried, settings.epsilon, rng)
    scored = score(settings.policy, memory.known(settings.window), asked)
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


def rates_of_arm(
    setup: Setup, round: int, arm: Arm, importance: Sequence[float] | None
) -> tuple[float, ...]:
    """Drop rates of an arm as the run's schedule has them in a round."""
    dropout = setup.config.dropout
    rates = arm_rates(arm, depth_of_run(setup), importance)
    return scheduled_rates(rates, dropout.schedule, _progress(setup, round), dropout.schedule_part)


def _progress(setup: Setup, round: int) -> float:
    return (round - 1) / setup.config.rounds


def is_deciding(setup: Setup, round: int) -> bool:
    """Whether arms differ in a round in what they drop; at a schedule's full depth none does."""
    dropout = setup.config.dropout
    return any(
        scheduled_rates((1.0,), dropout.schedule, _progress(setup, round), dropout.schedule_part)
    )


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
    trials, merged = [], []
    for plan, reply, (number, _) in zip(plans, replies, given, strict=True):
        if isinstance(reply, Update):
            merged.append((plan, reply))
            if reply.reward is not None and is_deciding(setup, round):
                trials.append(Trial(round, number, reply.reward))
    lengths = [update.cost.tokens / update.cost.rows for _, update in merged]
    memory = with_round(
        memory,
        trials,
        round,
        settings.window,
        fmean(lengths) if lengths else None,
        _importance(setup, merged) if merged else None,
    )
    seconds = _usual_seconds(setup, before, memory, round)
    if not is_deciding(setup, round):
        pass
    elif settings.policy == "successive_halving":
        fewer = halved(memory, round, settings.stage, settings.window, seconds)
        stays = _unfitted(setup, before, fewer, round) is not None
        memory = replace(memory, changed=fewer.changed) if stays else fewer
    else:
        memory = refreshed(
            memory,
            round,
            settings.refresh,
            settings.window,
            seconds,
            STEP,
            SHAPES_OF_NEIGHBOURS,
            depth_of_run(setup),
            seeds.numpy_generator(setup.config.seed, purpose="new arm", round=round),
        )
        if _unfitted(setup, before, memory, round) is not None:
            memory = replace(memory, arms=memory_of(before).arms)
    return _with_memory(after, memory, _shown(setup, plans, replies, given))


def _shown(
    setup: Setup,
    plans: Sequence[Plan],
    replies: Sequence[Reply],
    given: Sequence[tuple[int, Arm]],
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
        "gains": {
            str(plan.device): reply.reward
            for plan, reply in zip(plans, replies, strict=True)
            if isinstance(reply, Update)
        },
        "rates": [fmean(layer) for layer in zip(*rates, strict=True)],
        "trained": [fmean(layer >= lower for lower in lowest) for layer in range(setup.num_layers)],
    }


def note(setup: Setup, state: ServerState) -> Mapping[str, Any] | None:
    """What the configurator did in the last round and thinks now, for the ledger.

    ``chosen``: number of the arm of each device; ``gains``: of those that were merged; ``rates``,
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
    seconds = _usual_seconds(setup, state, memory, last["round"])
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


# What arms take


def _clock(setup: Setup) -> Clock:
    if setup.clock is None:
        raise DroppeftError(
            f"configurator.policy={setup.config.configurator.policy} needs the modelled clock, and "
            "this model's arithmetic cannot be counted; set configurator.policy=fixed"
        )
    return setup.clock


def _of_kinds(
    setup: Setup, cohort: Sequence[int], value: Callable[[DeviceProfile], list[Any]]
) -> list[list[Any]]:
    """A value of every device, found once for each kind."""
    fleet = _clock(setup).fleet
    names = [fleet.names[device] for device in cohort]
    found = {name: value(fleet.profiles[name]) for name in dict.fromkeys(names)}
    return [found[name] for name in names]


def _seconds(
    setup: Setup, state: ServerState, memory: Memory, round: int, profile: DeviceProfile
) -> list[float]:
    """Modelled seconds of a turn with each arm."""
    return [
        _turn_seconds(setup, state, memory, round, arm, profile) for arm in memory.arms.values()
    ]


def _usual_seconds(
    setup: Setup, state: ServerState, memory: Memory, round: int
) -> tuple[float, ...]:
    """The same, mean over the kinds of device that there are."""
    by_kind = [_seconds(setup, state, memory, round, kind) for kind in _kinds(setup).values()]
    return tuple(fmean(seconds) for seconds in zip(*by_kind, strict=True))


def _kinds(setup: Setup) -> Mapping[str, DeviceProfile]:
    fleet = _clock(setup).fleet
    return {name: fleet.profiles[name] for name in dict.fromkeys(fleet.names)}


def _turn_seconds(
    setup: Setup, state: ServerState, memory: Memory, round: int, arm: Arm, profile: DeviceProfile
) -> float:
    """Of a turn as it is expected: rows as long as lately, links as they are on average."""
    config = setup.config
    arithmetic = _clock(setup).arithmetic(state.model.adapter)
    steps = config.training.local_steps or USUAL_STEPS
    rates = rates_of_arm(setup, round, arm, memory.importance)
    lower = first_trained(arm, depth_of_run(setup))
    row = _row_flops(setup, arithmetic, memory.row_length, rates, lower)
    forward, rest = arithmetic.forward(memory.row_length)
    measuring = 2 * reward_rows(setup, round) * (sum(forward) + rest)
    values = state.model.tensors
    sent = {key: named for key, named in values.items() if not isinstance(key, int) or key >= lower}
    return (
        compute_seconds(profile, steps * config.training.batch_size * row + measuring, steps)
        + payload_bytes(values) * seconds_per_byte(profile.download)
        + payload_bytes(sent) * seconds_per_byte(profile.upload)
    )


def _row_flops(
    setup: Setup, arithmetic: Arithmetic, length: float, rates: Sequence[float], lower: int
) -> float:
    frozen, cached = setup.config.frozen.layers, setup.config.frozen.cache
    both, rest = arithmetic.training(length)
    forward, _ = arithmetic.forward(length)
    trained = sum((1 - rates[layer]) * both[layer] for layer in range(lower, setup.num_layers))
    return trained + sum(forward[frozen if cached else 0 : lower]) + rest


def reward_rows(setup: Setup, round: int) -> int:
    """None for a policy that learns nothing, and in rounds that show nothing."""
    settings = setup.config.configurator
    idle = settings.policy in ("fixed", "uniform_random") or not is_deciding(setup, round)
    return 0 if idle else settings.reward_rows


def _fitting(
    setup: Setup, state: ServerState, memory: Memory, round: int, profile: DeviceProfile
) -> list[bool]:
    """For which arms a kind of device has the memory."""
    return [
        bytes_of_arm(setup, state, memory, round, arm) <= profile.memory_bytes
        for arm in memory.arms.values()
    ]


def bytes_of_arm(setup: Setup, state: ServerState, memory: Memory, round: int, arm: Arm) -> int:
    """What a process takes that trains with an arm, at the longest rows.

    With `training.offload` as if all weights were in memory, which they are while gains are
    measured.
    """
    rates = rates_of_arm(setup, round, arm, memory.importance)
    lower = first_trained(arm, depth_of_run(setup))
    steps = setup.config.training.local_steps or USUAL_STEPS
    active = most_active(rates[lower:], setup.config.dropout.sampling, steps)
    adapter = state.model.adapter
    counts = setup.longest_step(adapter) if setup.longest_step else None
    counts = counts or _clock(setup).arithmetic(adapter).counts[-1]
    untrained = sum(block.trainable_parameters for block in counts.blocks[:lower])
    return step_memory(counts, active, lower).total + VALUE_BYTES * untrained


def _unfitted(setup: Setup, state: ServerState, memory: Memory, round: int) -> str | None:
    """A kind of device that none of the arms fits, in this round or the last.

    Schedules have full depth in the first round or the last.
    """
    for name, kind in _kinds(setup).items():
        for one in (round, setup.config.rounds):
            if not any(_fitting(setup, state, memory, one, kind)):
                return name
    return None


def _check_fits(setup: Setup, state: ServerState, memory: Memory) -> None:
    name = _unfitted(setup, state, memory, 1)
    if name is not None:
        arms, rounds = memory.arms.values(), (1, setup.config.rounds)
        least = max(
            min(bytes_of_arm(setup, state, memory, round, arm) for arm in arms) for round in rounds
        )
        raise DroppeftError(
            f"no arm of the configurator fits a {name}: the least takes {least / 1e9:.2f} GB, it "
            f"has {_kinds(setup)[name].memory_bytes / 1e9:.2f}; lower training.batch_size or "
            "training.max_length, or add larger configurator.means or prefixes"
        )
