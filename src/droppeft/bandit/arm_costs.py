"""Modelled seconds and bytes of an arm on each device profile. Ours."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from droppeft.bandit import Arm, arm_rates, first_trained
from droppeft.bandit.arms import Depth, modes_of_arm, steps_of_arm
from droppeft.bandit.bandit_memory import BanditMemory
from droppeft.bandit.policies import LAYER_VALUES, RANDOM
from droppeft.config import DeviceProfile
from droppeft.config.dropout import CALIBRATED, NO_CALIBRATION
from droppeft.costs.device_profiles import seconds_per_byte
from droppeft.costs.modelled_clock import Arithmetic, Clock, compute_seconds
from droppeft.costs.step_memory import most_active, step_memory
from droppeft.errors import DroppeftError
from droppeft.federated_method import Setup
from droppeft.messages.server_state import GlobalModel
from droppeft.sharing.expected_costs import scored_rows, typical_bytes

REWARD_ROWS = 16
"""Validation rows on which a client measures the reward ``loss``."""

TYPICAL_STEPS = 10
"""Assumed number of steps if local trainings are given in epochs, whose steps the server does not
know."""


def depth_of_run(setup: Setup) -> Depth:
    """The layers of the run to which arms apply.

    Raises:
        DroppeftError: arms drop layers by a calibration, and there is none.
    """
    config, dropout = setup.config, setup.config.dropout
    ends = dropout.protect_first, dropout.protect_last
    if dropout.shape != CALIBRATED:
        return Depth(setup.num_layers, config.frozen.count, *ends, dropout.shape)
    if not config.calibrates:  # no arm drops layers
        return Depth(setup.num_layers, config.frozen.count, *ends)
    if setup.calibration is None:
        raise DroppeftError(NO_CALIBRATION)
    return Depth(setup.num_layers, config.frozen.count, *ends, dropout.shape, setup.calibration)


def rates_of_arm(setup: Setup, arm: Arm) -> tuple[float, ...]:
    """Drop rate of each layer for an arm."""
    return arm_rates(arm, depth_of_run(setup))


def clock_of(setup: Setup) -> Clock:
    """The modelled clock of the run.

    Raises:
        DroppeftError: if there is none.
    """
    if setup.clock is None:
        raise DroppeftError(
            f"configurator.policy={setup.config.configurator.policy} needs the modelled clock, but "
            "the FLOPs of this model cannot be counted; set method=fedlora, or "
            "configurator.policy=fixed with method=droppeft"
        )
    return setup.clock


def for_clients(
    setup: Setup, cohort: Sequence[int], function: Callable[[DeviceProfile], list[Any]]
) -> list[list[Any]]:
    """The function's result for each client, computed once per device profile."""
    fleet = clock_of(setup).fleet
    names = [fleet.names[client] for client in cohort]
    results = {name: function(fleet.profiles[name]) for name in dict.fromkeys(names)}
    return [results[name] for name in names]


def seconds_of(
    setup: Setup, model: GlobalModel, memory: BanditMemory, profile: DeviceProfile
) -> list[float]:
    """Modelled seconds of a local training with each arm."""
    return [
        local_training_seconds(setup, model, memory.row_length, arm, profile)
        for arm in memory.arms.values()
    ]


def mean_seconds(setup: Setup, model: GlobalModel, memory: BanditMemory) -> tuple[float, ...]:
    """Modelled seconds of a local training with each arm, mean over the assigned profiles."""
    profiles = assigned_profiles(setup).values()
    by_profile = [seconds_of(setup, model, memory, profile) for profile in profiles]
    return tuple(fmean(seconds) for seconds in zip(*by_profile, strict=True))


def assigned_profiles(setup: Setup) -> Mapping[str, DeviceProfile]:
    """The device profiles that are assigned to some client, by name."""
    fleet = clock_of(setup).fleet
    return {name: fleet.profiles[name] for name in dict.fromkeys(fleet.names)}


def local_training_seconds(
    setup: Setup, model: GlobalModel, row_length: float, arm: Arm, profile: DeviceProfile
) -> float:
    """Expected seconds of a local training, with recent row lengths and mean transfer times."""
    config = setup.config
    arithmetic = clock_of(setup).arithmetic(model.adapter)
    steps = steps_of_arm(arm, config.training.local_steps or TYPICAL_STEPS)
    lower = first_trained(arm, depth_of_run(setup))
    row = _row_flops(setup, arithmetic, row_length, arm)
    forward, rest = arithmetic.forward(row_length)
    scored = scored_rows(config.sharing, setup.num_layers - lower)
    measuring = (2 * reward_rows(setup) + scored) * (sum(forward) + rest)
    values = model.tensors
    return (
        compute_seconds(profile, steps * config.training.batch_size * row + measuring, steps)
        + typical_bytes(config, values) * seconds_per_byte(profile.download)
        + typical_bytes(config, values, lower) * seconds_per_byte(profile.upload)
    )


def _row_flops(setup: Setup, arithmetic: Arithmetic, length: float, arm: Arm) -> float:
    """FLOPs of a row in a mean step; cached layers do not run."""
    both, rest = arithmetic.training(length)
    forward, _ = arithmetic.forward(length)
    modes = modes_of_arm(arm, depth_of_run(setup), cached=setup.config.frozen.cache)
    return rest + modes.expected(both, forward)


def reward_rows(setup: Setup) -> int:
    """How many validation rows a client measures its reward on; 0 if the reward is not used."""
    settings = setup.config.configurator
    unused = settings.policy in ("fixed", RANDOM, LAYER_VALUES) or settings.reward != "loss"
    return 0 if unused else REWARD_ROWS


def fitting_arms(
    setup: Setup, model: GlobalModel, arms: Iterable[Arm], profile: DeviceProfile
) -> list[bool]:
    """For each arm, whether the profile has enough memory."""
    return [bytes_of_arm(setup, model, arm) <= profile.memory_bytes for arm in arms]


def bytes_of_arm(setup: Setup, model: GlobalModel, arm: Arm) -> int:
    """Memory in bytes of a process that trains with an arm, for rows of full length.

    With ``training.offload`` all weights are counted as well, since they are in memory while the
    reward is measured.
    """
    rates = rates_of_arm(setup, arm)
    lower = first_trained(arm, depth_of_run(setup))
    steps = steps_of_arm(arm, setup.config.training.local_steps or TYPICAL_STEPS)
    active = most_active(rates[lower:], setup.config.dropout.sampling, steps)
    adapter = model.adapter
    counts = setup.longest_step(adapter) if setup.longest_step else None
    counts = counts or clock_of(setup).arithmetic(adapter).counts[-1]
    return step_memory(counts, active, setup.config.frozen.count, start=lower).total


def arms_that_fit(setup: Setup, model: GlobalModel, arms: Sequence[Arm]) -> list[Arm]:
    """The arms that fit the memory of some client.

    Raises:
        DroppeftError: if some client has not enough memory for any arm; the message names its
            device profile.
    """
    needed = {arm: bytes_of_arm(setup, model, arm) for arm in arms}
    profiles = assigned_profiles(setup)
    for name, profile in profiles.items():
        if min(needed.values()) > profile.memory_bytes:
            raise DroppeftError(
                f"no arm of the configurator fits the memory of {name}: the smallest needs "
                f"{min(needed.values()) / 1e9:.2f} GB of {profile.memory_bytes / 1e9:.2f} GB; "
                "lower training.batch_size or training.max_length, or add larger values to "
                "configurator.means, or smaller ones to configurator.depths"
            )
    largest = max(profile.memory_bytes for profile in profiles.values())
    return [arm for arm in arms if needed[arm] <= largest]
