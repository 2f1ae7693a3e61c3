"""The bandit in the rounds of a run: the arms of a cohort, and what their rewards teach. Ours."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from droppeft import seeds
from droppeft.adapters.types import TYPES
from droppeft.bandit import (
    Arm,
    Asked,
    Observation,
    ScoredArms,
    candidates,
    choose_together,
    neighbours,
    per_second,
    score,
)
from droppeft.bandit.arm_costs import (
    check_fits,
    depth_of_run,
    fits_somewhere,
    fitting,
    is_deciding,
    of_kinds,
    seconds_of,
    typical_seconds,
    unfitted,
)
from droppeft.bandit.bandit_memory import BanditMemory, begin, halved, refreshed, with_round
from droppeft.bandit.rewards import rewards_of
from droppeft.federated_method import Setup
from droppeft.messages import GlobalModel, Instruction, Reply, Update, first_trained_layer

STEP = 0.125
"""Of the mean drop rate, between neighbours."""


@dataclass(frozen=True)
class ArmsOfRound:
    """The arms of a round and their rewards, for people; nothing is decided by it.

    Attributes:
        round: which.
        chosen: number of the arm of each client of the cohort.
        labels: of these arms, by number.
        rewards: of each client whose update was merged; ``None`` where it shows nothing.
        rates: of each layer, mean drop rate over the cohort.
        trained: of each layer, share of the cohort that trained it.
    """

    round: int
    chosen: Mapping[int, int]
    labels: Mapping[int, str]
    rewards: Mapping[int, float | None]
    rates: tuple[float, ...]
    trained: tuple[float, ...]


def is_fixed(setup: Setup) -> bool:
    """Whether nothing is to be found out."""
    return setup.config.configurator.policy == "fixed"


def first_memory(setup: Setup, model: GlobalModel) -> BanditMemory:
    """All candidates, none tried.

    Raises:
        DroppeftError: no candidate is possible, none fits some client, or there is no clock.
    """
    settings = setup.config.configurator
    found = candidates(
        settings.means, settings.shapes, _untrained_shares(setup), depth_of_run(setup)
    )
    memory = begin(found, setup.config.training.max_length / 2)
    check_fits(setup, model, memory)
    possible = [arm for arm in found if fits_somewhere(setup, model, memory, arm, 1)]
    return begin(possible, memory.row_length)


def _untrained_shares(setup: Setup) -> Sequence[float]:
    """A prompt stands before the first layer: everything behind it has a backward."""
    layered = TYPES[setup.config.adapter.type].kind == "layered"
    return setup.config.configurator.untrained if layered else (0.0,)


def arms_of_round(
    setup: Setup, model: GlobalModel, memory: BanditMemory, round: int, cohort: Sequence[int]
) -> list[int]:
    """The number of an arm for every client, from the state, the round and the cohort alone."""
    settings = setup.config.configurator
    if not cohort:
        return []
    rng = seeds.numpy_generator(setup.config.seed, purpose="arms", round=round)
    common = (setup, model, memory, round)
    seconds = np.array(of_kinds(setup, cohort, lambda kind: seconds_of(*common, kind)))
    fits = np.array(of_kinds(setup, cohort, lambda kind: fitting(*common, kind)))
    if not settings.by_profile:
        seconds = np.tile(typical_seconds(*common), (len(cohort), 1))
    fits = _in_time(fits, seconds, setup.config.clock.deadline_s)
    numbers = memory.numbers
    untried = np.array([number not in memory.tried for number in numbers])
    asked = Asked(seconds, fits, untried, settings.epsilon, rng)
    known = memory.known(settings.window)
    if is_deciding(setup, round):
        scored = score(settings.policy, known, asked)
    else:
        scored = ScoredArms(np.tile(known.quality, (len(cohort), 1)), known.quality)
    places = choose_together(scored, seconds, fits)
    return [numbers[place] for place in places]


def _in_time(
    fits: npt.NDArray[np.bool_], seconds: npt.NDArray[np.float64], deadline_s: float | None
) -> npt.NDArray[np.bool_]:
    """Arms that end by the deadline, on clients that have one."""
    if deadline_s is None:
        return fits
    ends = fits & (seconds <= deadline_s)
    return np.where(ends.any(axis=1, keepdims=True), ends, fits)


def learned(
    setup: Setup,
    model: GlobalModel,
    memory: BanditMemory,
    instructions: Sequence[Instruction],
    replies: Sequence[Reply],
) -> tuple[BanditMemory, ArmsOfRound | None]:
    """The memory after a round, and what there is to show of it; failures teach nothing.

    Args:
        model: from which the instructions were made.
        memory: from which their arms were chosen.
    """
    if not instructions:
        return memory, None
    settings, round = setup.config.configurator, instructions[0].round
    given = [instruction.arm for instruction in instructions if instruction.arm is not None]
    labels = {number: memory.arms[number].label for number in given}
    rewards = rewards_of(setup, instructions, replies)
    merged = [
        (instruction, reply)
        for instruction, reply in zip(instructions, replies, strict=True)
        if isinstance(reply, Update)
    ]
    observations = [
        Observation(round, number, reward)
        for reward, number in zip(rewards, given, strict=True)
        if reward is not None and is_deciding(setup, round)
    ]
    lengths = [update.cost.tokens / update.cost.rows for _, update in merged]
    memory = with_round(
        memory,
        observations,
        round,
        settings.window,
        fmean(lengths) if lengths else None,
        _importance(setup, merged) if merged else None,
        given if is_deciding(setup, round) else (),
    )
    if is_deciding(setup, round):
        memory = _other_arms(setup, model, memory, round)
    return memory, _shown(setup, instructions, replies, labels, rewards)


def _other_arms(setup: Setup, model: GlobalModel, memory: BanditMemory, round: int) -> BanditMemory:
    """Fewer, or one exchanged, as the policy has it; every kind of client has one that fits."""
    settings = setup.config.configurator
    seconds = typical_seconds(setup, model, memory, round)

    def suffice(numbers: Collection[int]) -> bool:
        left = {number: memory.arms[number] for number in numbers}
        return unfitted(setup, model, replace(memory, arms=left), round) is None

    def near(arm: Arm) -> list[Arm]:
        several = any(_untrained_shares(setup))
        depth = depth_of_run(setup)
        found = neighbours(arm, STEP, settings.shapes, depth, several_depths=several)
        return [one for one in found if fits_somewhere(setup, model, memory, one, round)]

    if settings.policy == "successive_halving":
        return halved(memory, round, settings.stage, settings.window, seconds, suffice)
    rng = seeds.numpy_generator(setup.config.seed, purpose="new arm", round=round)
    new = refreshed(memory, round, settings.refresh, settings.window, seconds, near, rng)
    stays = unfitted(setup, model, new, round) is not None
    return replace(memory, changed=new.changed) if stays else new


def _shown(
    setup: Setup,
    instructions: Sequence[Instruction],
    replies: Sequence[Reply],
    labels: Mapping[int, str],
    rewards: Sequence[float | None],
) -> ArmsOfRound:
    rates = [instruction.dropout.rates for instruction in instructions if instruction.dropout]
    lowest = [first_trained_layer(instruction) for instruction in instructions]
    return ArmsOfRound(
        round=instructions[0].round,
        chosen={
            instruction.client: instruction.arm
            for instruction in instructions
            if instruction.arm is not None
        },
        labels=labels,
        rewards={
            instruction.client: reward
            for instruction, reply, reward in zip(instructions, replies, rewards, strict=True)
            if isinstance(reply, Update)
        },
        rates=tuple(fmean(layer) for layer in zip(*rates, strict=True)),
        trained=tuple(
            fmean(layer >= lower for lower in lowest) for layer in range(setup.num_layers)
        ),
    )


def note(
    setup: Setup, model: GlobalModel, memory: BanditMemory, last: ArmsOfRound
) -> Mapping[str, Any]:
    """What the bandit did in the last round and thinks now, as plain values for the ledger.

    Besides what :class:`ArmsOfRound` has: ``labels`` of the present arms too; ``quality``,
    ``deviation``, ``trials``, ``seconds``: of the present arms, in units of the typical reward, how
    often each was tried, and modelled seconds of a turn, mean over the kinds of client; ``best``:
    number of the arm with most reward per second.
    """
    known = memory.known(setup.config.configurator.window)
    seconds = typical_seconds(setup, model, memory, last.round)
    worth = per_second(known.quality, np.array(seconds)).tolist()
    numbers = memory.numbers
    labels = {**last.labels, **{number: arm.label for number, arm in memory.arms.items()}}
    return {
        "round": last.round,
        "chosen": _by_text(last.chosen),
        "labels": _by_text(labels),
        "rewards": _by_text(last.rewards),
        "rates": list(last.rates),
        "trained": list(last.trained),
        "present": list(numbers),
        "quality": [float(one) for one in known.quality],
        "deviation": [float(one) for one in known.deviation],
        "trials": [int(one) for one in known.count],
        "seconds": list(seconds),
        "best": numbers[worth.index(max(worth))],
    }


def _by_text(table: Mapping[int, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in table.items()}


def _importance(setup: Setup, merged: Sequence[tuple[Instruction, Update]]) -> list[float]:
    """Of each layer, mean over the turns that trained it; 0 where none did."""
    found = []
    for layer in range(setup.num_layers):
        seen = [
            update.importance[layer]
            for instruction, update in merged
            if layer >= first_trained_layer(instruction) and update.active_steps[layer] > 0
        ]
        found.append(fmean(seen) if seen else 0.0)
    return found
