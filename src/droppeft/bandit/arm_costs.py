"""What an arm of the bandit takes on each kind of client: seconds and bytes. Ours."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from droppeft.bandit import Arm, arm_rates, first_trained
from droppeft.bandit.arms import Depth
from droppeft.bandit.bandit_memory import BanditMemory
from droppeft.bandit.policies import LOT
from droppeft.config import DeviceProfile
from droppeft.costs.device_profiles import seconds_per_byte
from droppeft.costs.modelled_clock import Arithmetic, Clock, compute_seconds
from droppeft.costs.step_memory import VALUE_BYTES, most_active, step_memory
from droppeft.errors import DroppeftError
from droppeft.federated_method import Setup, in_round
from droppeft.messages import GlobalModel
from droppeft.sharing.expected_costs import scored_rows, typical_bytes

TYPICAL_STEPS = 10
"""Steps of a turn that is said in epochs, whose number the server does not know."""


def depth_of_run(setup: Setup) -> Depth:
    """The layers that arms are about."""
    dropout = setup.config.dropout
    frozen = setup.config.frozen.count
    return Depth(setup.num_layers, frozen, dropout.protect_first, dropout.protect_last)


def rates_of_arm(
    setup: Setup, round: int, arm: Arm, importance: Sequence[float] | None
) -> tuple[float, ...]:
    """Drop rates of an arm as the run's schedule has them in a round."""
    return in_round(setup, round, arm_rates(arm, depth_of_run(setup), importance))


def is_deciding(setup: Setup, round: int) -> bool:
    """Whether arms differ in a round in what they drop; at a schedule's full depth none does."""
    return any(in_round(setup, round, (1.0,)))


def clock_of(setup: Setup) -> Clock:
    if setup.clock is None:
        raise DroppeftError(
            f"configurator.policy={setup.config.configurator.policy} needs the modelled clock, and "
            "this model's arithmetic cannot be counted; set configurator.policy=fixed"
        )
    return setup.clock


def of_kinds(
    setup: Setup, cohort: Sequence[int], value: Callable[[DeviceProfile], list[Any]]
) -> list[list[Any]]:
    """A value of every client, found once for each kind."""
    fleet = clock_of(setup).fleet
    names = [fleet.names[client] for client in cohort]
    found = {name: value(fleet.profiles[name]) for name in dict.fromkeys(names)}
    return [found[name] for name in names]


def seconds_of(
    setup: Setup, model: GlobalModel, memory: BanditMemory, round: int, profile: DeviceProfile
) -> list[float]:
    """Modelled seconds of a turn with each arm."""
    return [
        local_training_seconds(setup, model, memory, round, arm, profile)
        for arm in memory.arms.values()
    ]


def typical_seconds(
    setup: Setup, model: GlobalModel, memory: BanditMemory, round: int
) -> tuple[float, ...]:
    """The same, mean over the kinds of client that there are."""
    by_kind = [seconds_of(setup, model, memory, round, kind) for kind in kinds(setup).values()]
    return tuple(fmean(seconds) for seconds in zip(*by_kind, strict=True))


def kinds(setup: Setup) -> Mapping[str, DeviceProfile]:
    fleet = clock_of(setup).fleet
    return {name: fleet.profiles[name] for name in dict.fromkeys(fleet.names)}


def local_training_seconds(
    setup: Setup,
    model: GlobalModel,
    memory: BanditMemory,
    round: int,
    arm: Arm,
    profile: DeviceProfile,
) -> float:
    """Of a turn as it is expected: rows as long as lately, links as they are on average."""
    config = setup.config
    arithmetic = clock_of(setup).arithmetic(model.adapter)
    steps = config.training.local_steps or TYPICAL_STEPS
    rates = rates_of_arm(setup, round, arm, memory.importance)
    lower = first_trained(arm, depth_of_run(setup))
    row = _row_flops(setup, arithmetic, memory.row_length, rates, lower)
    forward, rest = arithmetic.forward(memory.row_length)
    scored = scored_rows(config.sharing, setup.num_layers - lower)
    measuring = (2 * reward_rows(setup, round) + scored) * (sum(forward) + rest)
    values = model.tensors
    return (
        compute_seconds(profile, steps * config.training.batch_size * row + measuring, steps)
        + typical_bytes(config, values) * seconds_per_byte(profile.download)
        + typical_bytes(config, values, lower) * seconds_per_byte(profile.upload)
    )


def _row_flops(
    setup: Setup, arithmetic: Arithmetic, length: float, rates: Sequence[float], lower: int
) -> float:
    frozen, cached = setup.config.frozen.count, setup.config.frozen.cache
    both, rest = arithmetic.training(length)
    forward, _ = arithmetic.forward(length)
    trained = sum((1 - rates[layer]) * both[layer] for layer in range(lower, setup.num_layers))
    return trained + sum(forward[frozen if cached else 0 : lower]) + rest


def reward_rows(setup: Setup, round: int) -> int:
    """How many a client measures its reward on; 0 where nothing is learnt from it."""
    settings = setup.config.configurator
    idle = settings.policy in ("fixed", LOT) or not is_deciding(setup, round)
    return 0 if idle or settings.reward != "loss" else settings.reward_rows


def fitting(
    setup: Setup, model: GlobalModel, memory: BanditMemory, round: int, profile: DeviceProfile
) -> list[bool]:
    """For which arms a kind of client has the memory."""
    return [
        bytes_of_arm(setup, model, memory, round, arm) <= profile.memory_bytes
        for arm in memory.arms.values()
    ]


def bytes_of_arm(
    setup: Setup, model: GlobalModel, memory: BanditMemory, round: int, arm: Arm
) -> int:
    """What a process takes that trains with an arm, at the longest rows.

    With `training.offload` as if all weights were in memory, which they are while rewards are
    measured.
    """
    rates = rates_of_arm(setup, round, arm, memory.importance)
    lower = first_trained(arm, depth_of_run(setup))
    steps = setup.config.training.local_steps or TYPICAL_STEPS
    active = most_active(rates[lower:], setup.config.dropout.sampling, steps)
    adapter = model.adapter
    counts = setup.longest_step(adapter) if setup.longest_step else None
    counts = counts or clock_of(setup).arithmetic(adapter).counts[-1]
    untrained = sum(block.trainable_parameters for block in counts.blocks[:lower])
    return step_memory(counts, active, lower).total + VALUE_BYTES * untrained


def unfitted(setup: Setup, model: GlobalModel, memory: BanditMemory, round: int) -> str | None:
    """A kind of client that none of the arms fits, in this round or the last.

    Schedules have full depth in the first round or the last.
    """
    for name, kind in kinds(setup).items():
        for one in (round, setup.config.rounds):
            if not any(fitting(setup, model, memory, one, kind)):
                return name
    return None


def check_fits(setup: Setup, model: GlobalModel, memory: BanditMemory) -> None:
    name = unfitted(setup, model, memory, 1)
    if name is not None:
        arms, rounds = memory.arms.values(), (1, setup.config.rounds)
        least = max(
            min(bytes_of_arm(setup, model, memory, round, arm) for arm in arms) for round in rounds
        )
        raise DroppeftError(
            f"no arm of the configurator fits a {name}: the least takes {least / 1e9:.2f} GB, it "
            f"has {kinds(setup)[name].memory_bytes / 1e9:.2f}; lower training.batch_size or "
            "training.max_length, or add larger configurator.means or prefixes"
        )


def fits_somewhere(
    setup: Setup, model: GlobalModel, memory: BanditMemory, arm: Arm, round: int
) -> bool:
    """Whether some kind of client has the memory for an arm, in this round and the last."""
    most = max(kind.memory_bytes for kind in kinds(setup).values())
    rounds = (round, setup.config.rounds)
    return all(bytes_of_arm(setup, model, memory, one, arm) <= most for one in rounds)
