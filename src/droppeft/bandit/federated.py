"""The bandit in the rounds of a run: choose arms for a cohort, and learn from rewards. Ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from droppeft import seeds
from droppeft.adapters.types import TYPES
from droppeft.bandit import (
    Observation,
    PolicyInputs,
    ScoredArms,
    candidates,
    choose_together,
    per_second,
    score,
)
from droppeft.bandit.arm_costs import (
    arms_that_fit,
    depth_of_run,
    fitting_arms,
    for_clients,
    mean_seconds,
    seconds_of,
)
from droppeft.bandit.arms import Depths, possible_steps, trained_shares
from droppeft.bandit.bandit_memory import BanditMemory, begin, with_round
from droppeft.bandit.policies import LAYER_VALUES
from droppeft.bandit.rewards import rewards_of, values_of_layers
from droppeft.federated_method import Setup
from droppeft.messages.instruction import Instruction, modes_of
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import GlobalModel

TEACHERS = 2
"""Clients of a round that train all layers. Fewer than two could not be compared."""

LEAST_VALUE = 0.85
"""Share of what a round would be worth, if every client trained all layers in all steps, that it is
worth at least. Shorter rounds may teach more per second, but a run has a fixed number of them."""


@dataclass(frozen=True)
class ArmsOfRound:
    """The arms of a round and their rewards, for the ledger only.

    Attributes:
        round: number of the round.
        chosen: by client of the cohort, the number of its arm.
        labels: labels of these arms by number.
        rewards: by client whose update was merged, its reward; ``None`` if it has none.
        rates: mean drop rate of each layer over the cohort.
        trained: share of the cohort's steps in which each layer can be trained: it is not below the
            depths that they draw.
    """

    round: int
    chosen: Mapping[int, int]
    labels: Mapping[int, str]
    rewards: Mapping[int, float | None]
    rates: tuple[float, ...]
    trained: tuple[float, ...]


def is_fixed(setup: Setup) -> bool:
    """Whether the run has no bandit."""
    return setup.config.configurator.policy == "fixed"


def first_memory(setup: Setup, model: GlobalModel) -> BanditMemory:
    """The memory before round 1, with all candidates that fit some client.

    Raises:
        DroppeftError: if no candidate is possible, if none fits some client, or if there is no
            modelled clock.
    """
    settings = setup.config.configurator
    local_steps = setup.config.training.local_steps
    steps = (1.0,) if local_steps is None else possible_steps(settings.steps, local_steps)
    arms = candidates(settings.means, _depths(setup), steps, depth_of_run(setup))
    row_length = setup.config.training.max_length / 2
    return begin(arms_that_fit(setup, model, arms), row_length, setup.num_layers)


def _depths(setup: Setup) -> Sequence[Depths]:
    """Configured depths of arms; all layers for prompts, which need a backward through them."""
    layered = TYPES[setup.config.adapter.type].kind == "layered"
    return setup.config.configurator.depths if layered else ((1.0,),)


def arms_of_round(
    setup: Setup, model: GlobalModel, memory: BanditMemory, round: int, cohort: Sequence[int]
) -> list[int]:
    """The number of an arm for each client, a function of state, round and cohort only."""
    if not cohort:
        return []
    rng = seeds.numpy_generator(setup.config.seed, purpose="arms", round=round)
    arms = memory.arms.values()
    seconds = np.array(
        for_clients(setup, cohort, lambda profile: seconds_of(setup, model, memory, profile))
    )
    fits = np.array(
        for_clients(setup, cohort, lambda profile: fitting_arms(setup, model, arms, profile))
    )
    fits = _in_time(fits, seconds, setup.config.clock.deadline_s)
    numbers = memory.numbers
    if setup.config.configurator.policy == LAYER_VALUES:
        worth = _worth(setup, memory)
        scored = ScoredArms(np.tile(worth, (len(cohort), 1)), worth)
        able = _teaching_all(setup, memory, seconds, fits)
        chosen = choose_together(scored, seconds, able, LEAST_VALUE)
        return [numbers[index] for index in chosen]
    untried = np.array([number not in memory.tried for number in numbers])
    inputs = PolicyInputs(seconds, fits, untried, rng)
    scored = score(setup.config.configurator.policy, memory.known(), inputs)
    return [numbers[index] for index in choose_together(scored, seconds, fits)]


def _worth(setup: Setup, memory: BanditMemory) -> npt.NDArray[np.float64]:
    """(A,) what a local training with each arm is worth, relative to all layers in all steps.

    All layers are those above the frozen ones.
    """
    depth = depth_of_run(setup)
    above = [float(layer >= depth.frozen) for layer in range(depth.layers)]
    values = [
        arm.steps * memory.layers.of(trained_shares(arm, depth)) for arm in memory.arms.values()
    ]
    return np.array(values) / memory.layers.of(above)


def _teaching_all(
    setup: Setup,
    memory: BanditMemory,
    seconds: npt.NDArray[np.float64],
    fits: npt.NDArray[np.bool_],
) -> npt.NDArray[np.bool_]:
    """``fits`` without the arms with which the fastest clients would leave layers untrained.

    Every layer is trained by :data:`TEACHERS` clients of a round, as far as their memory allows: no
    layer is left as it is, and the values of all layers stay known.
    """
    depth = depth_of_run(setup)
    complete = np.array(
        [min(trained_shares(arm, depth)[depth.frozen :]) == 1 for arm in memory.arms.values()]
    )
    able = [client for client in range(len(fits)) if (fits[client] & complete).any()]
    fits = fits.copy()
    for client in sorted(able, key=lambda client: float(seconds[client].sum()))[:TEACHERS]:
        fits[client] &= complete
    return fits


def _in_time(
    fits: npt.NDArray[np.bool_], seconds: npt.NDArray[np.float64], deadline_s: float | None
) -> npt.NDArray[np.bool_]:
    """``fits`` without arms that miss the deadline, for clients that have an arm which meets it."""
    if deadline_s is None:
        return fits
    in_time = fits & (seconds <= deadline_s)
    return np.where(in_time.any(axis=1, keepdims=True), in_time, fits)


def learned(
    setup: Setup,
    model: GlobalModel,
    memory: BanditMemory,
    instructions: Sequence[Instruction],
    replies: Sequence[Reply],
) -> tuple[BanditMemory, ArmsOfRound | None]:
    """The memory after a round, and the round's arms for the ledger; failures are ignored.

    Args:
        model: the model from which the instructions were made.
        memory: the memory from which their arms were chosen.
    """
    if not instructions:
        return memory, None
    round = instructions[0].round
    given = [instruction.arm for instruction in instructions if instruction.arm is not None]
    labels = {number: memory.arms[number].label for number in given}
    rewards = rewards_of(setup, instructions, replies)
    observations = [
        Observation(round, number, reward)
        for reward, number in zip(rewards, given, strict=True)
        if reward is not None
    ]
    layers = memory.layers
    if setup.config.configurator.policy == LAYER_VALUES:
        layers = layers.after(values_of_layers(instructions, replies))
    lengths = [r.cost.tokens / r.cost.rows for r in replies if isinstance(r, Update)]
    memory = with_round(
        replace(memory, layers=layers),
        observations,
        round,
        fmean(lengths) if lengths else None,
        given,
    )
    return memory, _arms_of_round(setup, instructions, replies, labels, rewards)


def _arms_of_round(
    setup: Setup,
    instructions: Sequence[Instruction],
    replies: Sequence[Reply],
    labels: Mapping[int, str],
    rewards: Sequence[float | None],
) -> ArmsOfRound:
    rates = [instruction.dropout.rates for instruction in instructions if instruction.dropout]
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
            fmean(
                fmean(layer >= start for start in modes_of(instruction).starts)
                for instruction in instructions
            )
            for layer in range(setup.num_layers)
        ),
    )


def note(
    setup: Setup, model: GlobalModel, memory: BanditMemory, last: ArmsOfRound
) -> Mapping[str, Any]:
    """What the bandit did in the last round and what it knows now, as plain values for the ledger.

    The keys are the fields of :class:`ArmsOfRound`, where ``labels`` has those of the current arms
    as well, and:

    - ``present``: numbers of the current arms, in the order of the following lists;
    - ``quality``, ``deviation``: expected reward and its uncertainty, in units of the typical
      reward;
    - ``layer_values``: what training each layer above the frozen ones is worth; ``None`` with other
      policies, and as long as no round told;
    - ``trials``: number of observations in the window;
    - ``seconds``: modelled seconds of a local training, mean over the device profiles;
    - ``best``: number of the arm with the largest reward per second.
    """
    known = memory.known()
    quality, deviation = known.quality, known.deviation
    by_layer = setup.config.configurator.policy == LAYER_VALUES
    if by_layer:
        quality, deviation = _worth(setup, memory), np.zeros(len(memory.arms))
    seconds = mean_seconds(setup, model, memory)
    worth = per_second(quality, np.array(seconds)).tolist()
    numbers = memory.numbers
    labels = {**last.labels, **{number: arm.label for number, arm in memory.arms.items()}}
    return {
        "round": last.round,
        "chosen": _with_text_keys(last.chosen),
        "labels": _with_text_keys(labels),
        "rewards": _with_text_keys(last.rewards),
        "rates": list(last.rates),
        "trained": list(last.trained),
        "present": list(numbers),
        "quality": [float(value) for value in quality],
        "deviation": [float(value) for value in deviation],
        "layer_values": list(memory.layers.values[setup.config.frozen.count :])
        if by_layer and any(memory.layers.rounds)
        else None,
        "trials": [int(value) for value in known.count],
        "seconds": list(seconds),
        "best": numbers[worth.index(max(worth))],
    }


def _with_text_keys(table: Mapping[int, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in table.items()}
