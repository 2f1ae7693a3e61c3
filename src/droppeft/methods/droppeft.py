"""DropPEFT: devices train with stochastic transformer layer dropout and share by layer.

Source: arXiv:2503.10217. The rates are the configuration's, or those that the configurator finds
(`methods/configured.py`); which layers are shared is `methods/personal_layers.py`'s. Exact gates,
protected ends and schedules are ours.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.config import DropoutConfig
from droppeft.configurator import Arm, first_trained
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import explicit_rates, layer_rates, protected_ends
from droppeft.methods import configured
from droppeft.methods.arm_costs import depth_of_run, rates_of_arm, reward_rows
from droppeft.methods.base import (
    Method,
    Setup,
    full_plan,
    in_round,
    start_with,
    uniform_adapter,
    with_mean,
    without_steps,
)
from droppeft.methods.personal_layers import (
    check_fraction,
    check_sharing,
    has_global_head,
    keeps_anything,
    usual_of,
    weight_of,
    with_sharing,
)
from droppeft.plans import LayerDropout, Plan, Reply, ServerState, Update, flatten
from droppeft.sharing.aggregation import average_over_everyone, average_over_holders
from droppeft.sharing.factors import average_products
from droppeft.sharing.visits import with_visits

AVERAGES = {
    ("holders", "separate"): average_over_holders,
    ("holders", "product"): average_products,
    ("everyone", "separate"): average_over_everyone,
}
"""By ``sharing.mean`` and ``sharing.factors``."""


def configured_rates(config: DropoutConfig, num_layers: int, frozen: int = 0) -> tuple[float, ...]:
    """Dropout rate of every layer; 0 for the first ``frozen``, the others as if there were no more.

    Raises:
        DroppeftError: a mean or count that the protected layers make impossible, or a list of
            rates that does not fit the model.
    """
    if config.rates is not None:
        return _of_all_layers(config.rates, num_layers, frozen)
    return (0.0,) * frozen + _spread(config, num_layers - frozen)


def _of_all_layers(given: Sequence[float], num_layers: int, frozen: int) -> tuple[float, ...]:
    rates = explicit_rates(given, num_layers)
    if any(rates[:frozen]):
        raise DroppeftError(
            f"dropout.rates drops one of the first {frozen} layers, which are frozen "
            f"(frozen.layers={frozen}); set the first {frozen} rates to 0"
        )
    return rates


def _spread(config: DropoutConfig, num_layers: int) -> tuple[float, ...]:
    protected = protected_ends(num_layers, config.protect_first, config.protect_last)
    if config.count is None:
        return layer_rates(config.mean or 0.0, config.shape, num_layers, protected=protected)
    most = num_layers - len(protected)
    if config.count > most:
        raise DroppeftError(
            f"dropout.count={config.count} is impossible: {num_layers} layers of which "
            f"{len(protected)} are protected leave {most} to drop"
        )
    return layer_rates(config.count / num_layers, config.shape, num_layers, protected=protected)


def _init(setup: Setup) -> ServerState:
    check_fraction(setup)
    state = start_with(setup, uniform_adapter(setup))
    if not configured.is_fixed(setup):
        return configured.first_memory(setup, state)
    rates_of_round(setup, 1)
    return state


def rates_of_round(setup: Setup, round: int) -> tuple[float, ...]:
    """The configuration's rates as their schedule has them in a round.

    Raises:
        DroppeftError: as :func:`configured_rates`.
    """
    config = setup.config
    return in_round(
        setup, round, configured_rates(config.dropout, setup.num_layers, config.frozen.layers)
    )


def _plan(setup: Setup, state: ServerState, round: int, cohort: Sequence[int]) -> list[Plan]:
    if configured.is_fixed(setup):
        gates = _gates(setup, rates_of_round(setup, round))
        plans = [full_plan(setup, state, round, device, gates) for device in cohort]
    else:
        arms = configured.arms_of_round(setup, state, round, cohort)
        importance = configured.memory_of(state).importance
        plans = [
            _with_arm(setup, state, round, device, arm, importance)
            for device, (_, arm) in zip(cohort, arms, strict=True)
        ]
    usual = usual_of(setup, state)
    return [with_sharing(setup, state, plan, usual) for plan in plans]


def _own(setup: Setup, state: ServerState, round: int, device: int) -> Plan:
    plan = full_plan(setup, state, round, device)
    return without_steps(with_sharing(setup, state, plan))


def _gates(setup: Setup, rates: tuple[float, ...]) -> LayerDropout:
    settings = setup.config.dropout
    return LayerDropout(
        rates, settings.sampling, None if settings.every == "round" else settings.every
    )


def _with_arm(
    setup: Setup,
    state: ServerState,
    round: int,
    device: int,
    arm: Arm,
    importance: Sequence[float] | None,
) -> Plan:
    """All values travel to the device, back those of the layers that it trains."""
    rates = rates_of_arm(setup, round, arm, importance)
    plan = full_plan(setup, state, round, device, _gates(setup, rates))
    plan = replace(plan, reward_rows=reward_rows(setup, round))
    lower = first_trained(arm, depth_of_run(setup))
    if lower == setup.config.frozen.layers:
        return plan
    names = frozenset(
        name for key, name, _ in flatten(plan.tensors) if not isinstance(key, int) or key >= lower
    )
    return replace(plan, train=names, share=names, untrained=lower)


def _merge(
    setup: Setup, state: ServerState, plans: Sequence[Plan], replies: Sequence[Reply]
) -> ServerState:
    config = setup.config
    updates = [reply for reply in replies if isinstance(reply, Update)]
    mean = AVERAGES[config.sharing.mean, config.sharing.factors](
        state.model.tensors, updates, weight_of(config)
    )
    merged = with_mean(setup, state, updates, mean)
    if keeps_anything(config):
        merged = with_visits(merged, plans, replies)
    if configured.is_fixed(setup):
        return merged
    return configured.learned(setup, state, merged, plans, replies)


DROPPEFT = Method(
    name="droppeft",
    summary="layer dropout per mini-batch, sharing by layer (DropPEFT)",
    tables=frozenset({"dropout", "configurator", "sharing", "frozen", "server"}),
    init=_init,
    plan=_plan,
    merge=_merge,
    check=check_sharing,
    own=_own,
    has_global_model=has_global_head,
    note=configured.note,
)
