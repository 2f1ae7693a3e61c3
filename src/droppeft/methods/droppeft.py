"""DropPEFT: clients train with stochastic layer dropout and share their adapters layer by layer.

Source: arXiv:2503.10217. The drop rates are configured or chosen by the bandit
(:mod:`droppeft.bandit`); :mod:`droppeft.methods.personal_layers` says which layers a client shares.
Ours: dropping exactly the same number of layers in every step, protected layers, rates by what each
layer is worth, and schedules of the rates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from droppeft.bandit import federated as bandit
from droppeft.bandit.arm_costs import depth_of_run, rates_of_arm, reward_rows
from droppeft.bandit.arms import starts_of_arm, steps_of_arm
from droppeft.bandit.bandit_memory import BanditMemory
from droppeft.bandit.federated import ArmsOfRound
from droppeft.config import DropoutConfig
from droppeft.config.dropout import CALIBRATED, NO_CALIBRATION
from droppeft.errors import DroppeftError
from droppeft.federated_method import (
    Method,
    Setup,
    all_tensors,
    apply_mean,
    evaluation_only,
    full_instruction,
    start_with,
    uniform_adapter,
)
from droppeft.layer_dropout import (
    Calibration,
    explicit_rates,
    layer_rates,
    protected_ends,
    scheduled_rates,
)
from droppeft.layer_dropout.modes import starts_of
from droppeft.layer_dropout.schedules import PART
from droppeft.messages.instruction import Budget, Instruction, LayerDropout
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import flatten
from droppeft.methods.personal_layers import (
    check_fraction,
    check_sharing,
    has_global_head,
    has_personal_tensors,
    typical_of,
    with_sharing,
)
from droppeft.sharing.aggregation import average_over_senders, by_targets
from droppeft.sharing.participation import ParticipationMemory, with_participations


@dataclass(frozen=True)
class DropPEFTMemory(ParticipationMemory):
    """The method's memory in :class:`~droppeft.messages.server_state.ServerState`.

    Attributes:
        bandit: what the bandit has learnt; ``None`` with fixed rates.
        last_round: arms and rewards of the last round; ``None`` before the first round.
    """

    bandit: BanditMemory | None = None
    last_round: ArmsOfRound | None = None


def configured_rates(
    config: DropoutConfig,
    num_layers: int,
    frozen: int = 0,
    calibration: Calibration | None = None,
) -> tuple[float, ...]:
    """Drop rate of every layer.

    Frozen layers have the rate 0; mean, count and shape refer to the layers above them.

    Raises:
        DroppeftError: if the protected layers make the mean or the count impossible, if a list of
            rates does not fit the model, or if the shape needs a calibration and there is none.
    """
    if config.rates is not None:
        return _listed_rates(config.rates, num_layers, frozen)
    trained = num_layers - frozen
    protected = protected_ends(trained, config.protect_first, config.protect_last)
    mean = _mean(config, trained, len(protected))
    if config.shape == CALIBRATED:
        if calibration is None:
            raise DroppeftError(NO_CALIBRATION)
        rates = calibration.rates(mean, first=frozen, protected=protected)
    else:
        rates = layer_rates(mean, config.shape, trained, protected=protected)
    return (0.0,) * frozen + rates


def _listed_rates(listed: Sequence[float], num_layers: int, frozen: int) -> tuple[float, ...]:
    rates = explicit_rates(listed, num_layers)
    if any(rates[:frozen]):
        raise DroppeftError(
            f"dropout.rates drops one of the first {frozen} layers, which are frozen "
            f"(frozen.layers={frozen}); set the first {frozen} rates to 0"
        )
    return rates


def _mean(config: DropoutConfig, num_layers: int, protected: int) -> float:
    """The mean rate of the layers that are not frozen."""
    if config.count is None:
        return config.mean or 0.0
    droppable = num_layers - protected
    if config.count > droppable:
        raise DroppeftError(
            f"dropout.count={config.count} is impossible: {protected} of {num_layers} layers "
            f"are protected; set at most {droppable}, or protect fewer layers"
        )
    return config.count / num_layers


def _starts(setup: Setup) -> tuple[int, ...]:
    """Candidates for the lowest layer that a step trains, of which it draws one."""
    frozen = setup.config.frozen.count
    return starts_of(setup.config.backward.depths, setup.num_layers, frozen)


def _init(setup: Setup) -> ServerState:
    check_fraction(setup)
    state = start_with(setup, uniform_adapter(setup))
    if bandit.is_fixed(setup):
        rates_of_round(setup, 1)
        return replace(state, memory=DropPEFTMemory())
    return replace(state, memory=DropPEFTMemory(bandit=bandit.first_memory(setup, state.model)))


def rates_of_round(setup: Setup, round: int) -> tuple[float, ...]:
    """The configured drop rates in a round, after the schedule.

    Raises:
        DroppeftError: as :func:`configured_rates`.
    """
    config = setup.config
    frozen, found = config.frozen.count, setup.calibration
    rates = configured_rates(config.dropout, setup.num_layers, frozen, found)
    return scheduled_rates(rates, config.dropout.schedule, (round - 1) / config.rounds, PART)


def _instruct(
    setup: Setup, state: ServerState, round: int, cohort: Sequence[int]
) -> list[Instruction]:
    memory: DropPEFTMemory = state.memory
    if memory.bandit is None:
        gates, starts = _gates(setup, rates_of_round(setup, round)), _starts(setup)
        instructions = [
            replace(full_instruction(setup, state, round, client, gates), starts=starts)
            for client in cohort
        ]
    else:
        arms = bandit.arms_of_round(setup, state.model, memory.bandit, round, cohort)
        instructions = [
            _with_arm(full_instruction(setup, state, round, client), setup, memory.bandit, number)
            for client, number in zip(cohort, arms, strict=True)
        ]
    typical = typical_of(setup, state)
    return [with_sharing(setup, state, instruction, typical) for instruction in instructions]


def _evaluate_client(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    instruction = full_instruction(setup, state, round, client)
    return evaluation_only(with_sharing(setup, state, instruction))


def _gates(setup: Setup, rates: tuple[float, ...]) -> LayerDropout:
    settings = setup.config.dropout
    return LayerDropout(
        rates, settings.sampling, None if settings.every == "round" else settings.every
    )


def _with_arm(
    instruction: Instruction, setup: Setup, memory: BanditMemory, number: int
) -> Instruction:
    """The instruction with an arm's drop rates, depths and number of steps.

    The client gets the tensors of all layers and sends back those of the layers that it trains.
    """
    arm, local_steps = memory.arms[number], setup.config.training.local_steps
    gates = _gates(setup, rates_of_arm(setup, arm))
    starts = starts_of_arm(arm, depth_of_run(setup))
    instruction = replace(
        instruction, dropout=gates, starts=starts, reward_rows=reward_rows(setup), arm=number
    )
    if local_steps is not None:
        instruction = replace(instruction, budget=Budget(steps=steps_of_arm(arm, local_steps)))
    lower = min(starts)
    if lower == setup.config.frozen.count:
        return instruction
    names = frozenset(
        name
        for key, name, _ in flatten(instruction.tensors)
        if not isinstance(key, int) or key >= lower
    )
    return replace(instruction, train=names, share=names)


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    config = setup.config
    updates = [reply for reply in replies if isinstance(reply, Update)]
    mean = average_over_senders(state.model.tensors, updates, by_targets)
    merged = apply_mean(setup, state, updates, mean)
    if has_personal_tensors(config):
        merged = with_participations(merged, instructions, replies)
    memory: DropPEFTMemory = merged.memory
    if memory.bandit is None:
        return merged
    learnt, last = bandit.learned(setup, state.model, memory.bandit, instructions, replies)
    return replace(merged, memory=replace(memory, bandit=learnt, last_round=last))


def _note(setup: Setup, state: ServerState) -> Mapping[str, Any] | None:
    memory: DropPEFTMemory = state.memory
    if memory.bandit is None or memory.last_round is None:
        return None
    return bandit.note(setup, state.model, memory.bandit, memory.last_round)


DROPPEFT = Method(
    name="droppeft",
    summary="layer dropout per mini-batch, sharing by layer (DropPEFT)",
    tables=frozenset({"backward", "dropout", "configurator", "sharing", "frozen", "server"}),
    init=_init,
    instruct=_instruct,
    merge=_merge,
    check=check_sharing,
    evaluate_client=_evaluate_client,
    has_global_model=has_global_head,
    note=_note,
    sent=all_tensors,
    memory_type=DropPEFTMemory,
)
