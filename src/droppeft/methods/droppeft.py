"""DropPEFT: devices train with stochastic transformer layer dropout and share by layer.

Source: arXiv:2503.10217. In this version the rates are the configuration's, the same on every
device and in every round, and all layers are shared; the online configurator and personalised
layer sharing are not built yet. Exact gates, protected ends and schedules are ours.
"""

from collections.abc import Sequence

from droppeft.config import DropoutConfig
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import explicit_rates, layer_rates, protected_ends, scheduled_rates
from droppeft.methods.base import (
    Method,
    Setup,
    average_by_examples,
    full_plan,
    start_with,
    uniform_adapter,
)
from droppeft.plans import LayerDropout, Plan, ServerState


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
    adapter = uniform_adapter(setup)
    rates_of_round(setup, 1)
    return start_with(setup, adapter)


def rates_of_round(setup: Setup, round: int) -> tuple[float, ...]:
    """The configuration's rates as their schedule has them in a round.

    Raises:
        DroppeftError: as :func:`configured_rates`.
    """
    settings = setup.config.dropout
    return scheduled_rates(
        configured_rates(settings, setup.num_layers, setup.config.frozen.layers),
        settings.schedule,
        (round - 1) / setup.config.rounds,
        settings.schedule_part,
    )


def _plan(setup: Setup, state: ServerState, round: int, cohort: Sequence[int]) -> list[Plan]:
    settings = setup.config.dropout
    rates = rates_of_round(setup, round)
    every = None if settings.every == "round" else settings.every
    dropout = LayerDropout(rates, settings.sampling, every)
    return [full_plan(setup, state, round, device, dropout) for device in cohort]


DROPPEFT = Method(
    name="droppeft",
    summary="layer dropout per mini-batch, sharing by layer (DropPEFT)",
    tables=frozenset({"dropout", "frozen"}),
    init=_init,
    plan=_plan,
    merge=average_by_examples,
)
