"""What a configuration must keep to, as far as it can be said before a model is loaded; ours.

What a single value may be, and how values of the configuration bound each other, stands in
:mod:`droppeft.config`; what needs the number of layers, in a method's ``init``. All else is here or
in a method's ``check``, for words, files, comparisons and Python alike. Only a setting that differs
from its default counts as given, however it was written: the ``config.toml`` of a run lists every
value, and repeats the run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from droppeft.adapters.settings import check
from droppeft.adapters.types import TYPES, check_on
from droppeft.config import Config, as_tree, build_config, flat
from droppeft.config.schema import METHOD_DEFAULTS
from droppeft.errors import DroppeftError
from droppeft.federated_method import Method, adapter_spec
from droppeft.methods import METHODS, method_named
from droppeft.models.offloading import check_offload
from droppeft.sharing.criteria import CRITERIA


@dataclass(frozen=True)
class NoEffect:
    """Settings that have no effect in some configurations.

    Attributes:
        keys: of the settings, or of a table with a dot behind it.
        when: whether it is such a configuration.
        reason: what takes the effect, behind "has no effect with"; ``{config...}`` is replaced.
        instead: what to do.
        read: the method has to read this table for the rule to hold; ``None`` for any method.
        but: keys of the table that do have an effect.
    """

    keys: tuple[str, ...]
    when: Callable[[Config], bool]
    reason: str
    instead: str = "leave it out"
    read: str | None = None
    but: tuple[str, ...] = ()

    def concerns(self, key: str) -> bool:
        """Whether it is about a setting."""
        tables = tuple(name for name in self.keys if name.endswith("."))
        return (key in self.keys or key.startswith(tables)) and key not in self.but

    def holds(self, config: Config) -> bool:
        """Whether its settings have no effect in a configuration."""
        reads = self.read is None or self.read in method_named(config.method).tables
        return reads and self.when(config)


NO_EFFECT = (
    NoEffect(
        keys=("configurator.",),
        but=("configurator.policy",),
        read="configurator",
        when=lambda config: config.configurator.policy == "fixed",
        reason="configurator.policy={config.configurator.policy}",
        instead="leave it out, or set another policy",
    ),
    NoEffect(
        keys=("dropout.mean", "dropout.count", "dropout.rates", "dropout.shape"),
        read="configurator",
        when=lambda config: config.configurator.policy != "fixed",
        reason="configurator.policy={config.configurator.policy}, where arms have the rates",
        instead="leave it out, or set configurator.policy=fixed",
    ),
    NoEffect(
        keys=("configurator.reward_rows",),
        read="configurator",
        when=lambda config: config.configurator.reward != "loss",
        reason="configurator.reward={config.configurator.reward}, which no client measures",
    ),
    NoEffect(
        keys=("sharing.criterion", "sharing.hysteresis", "sharing.score_rows"),
        read="sharing",
        when=lambda config: config.sharing.fraction == 1,
        reason="sharing.fraction=1, where all layers are shared",
        instead="leave it out, or set a smaller fraction",
    ),
    NoEffect(
        keys=("sharing.hysteresis",),
        read="sharing",
        when=lambda config: config.sharing.criterion == "position",
        reason="sharing.criterion=position, which never changes its mind",
    ),
    NoEffect(
        keys=("sharing.score_rows",),
        read="sharing",
        when=lambda config: CRITERIA[config.sharing.criterion].runs_model == "no",
        reason="sharing.criterion={config.sharing.criterion}, which does not run the model to "
        "score",
    ),
    NoEffect(
        keys=("server.",),
        but=("server.optimizer",),
        read="server",
        when=lambda config: config.server.optimizer == "none",
        reason="server.optimizer={config.server.optimizer}",
        instead="leave it out, or set another optimiser",
    ),
    NoEffect(
        keys=("server.second_momentum", "server.tau"),
        read="server",
        when=lambda config: config.server.optimizer == "momentum",
        reason="server.optimizer={config.server.optimizer}",
        instead="leave it out, or set another optimiser",
    ),
    NoEffect(
        keys=("flower.",),
        when=lambda config: config.transport != "flower",
        reason="transport={config.transport}",
    ),
)
"""The first rule that holds for a setting is the one that is said."""

COSTLY = (
    *("model", "quantization", "accelerator", "threads", "seed"),
    *("adapter.", "dropout.", "frozen.", "clock.custom."),
    *("training.batch_size", "training.max_length", "training.precision"),
    *("training.checkpointing", "training.offload"),
)
"""Settings, or beginnings of some, that change what a step costs or where it is measured."""


def check_settings(config: Config) -> None:
    """Refuse what cannot work, and what would be ignored.

    Raises:
        DroppeftError: an unknown method, a setting without effect, or settings that do not go
            together; with the key and what to do.
    """
    method = method_named(config.method)
    for key, rule in without_effect(config).items():
        raise DroppeftError(f"{key} has no effect with {reason_of(rule, config)}; {rule.instead}")
    check(adapter_spec(config.adapter, num_layers=1))
    check_on(config.adapter.type, config.adapter.options, config.quantization)
    check_offload(config)
    _check_frozen(config)
    _check_measured(method, config)
    method.check(config)


def without_effect(config: Config) -> dict[str, NoEffect]:
    """Given settings that change nothing, each with the rule that says so.

    Raises:
        DroppeftError: an unknown method.
    """
    rules = [rule for rule in (_unread(config), *NO_EFFECT) if rule.holds(config)]
    found: dict[str, NoEffect] = {}
    for key in given(config):
        for rule in rules:
            if rule.concerns(key):
                found.setdefault(key, rule)
    return found


def reason_of(rule: NoEffect, config: Config) -> str:
    """What takes the effect of a rule's settings in a configuration."""
    return rule.reason.format(config=config)


def given(config: Config) -> Mapping[str, Any]:
    """Settings by dotted key that differ from the defaults of the configuration's method."""
    typical = flat(as_tree(build_config({"method": config.method})))
    return {
        key: value
        for key, value in flat(as_tree(config)).items()
        if key not in typical or typical[key] != value
    }


def check_costly(words: Sequence[str]) -> None:
    """Refuse a word about a setting that changes nothing in what a step costs.

    A file is not looked at: it may be that of a whole run.

    Args:
        words: ``key=value``.

    Raises:
        DroppeftError: with the setting.
    """
    adapters = [name for name, defaults in METHOD_DEFAULTS.items() if "adapter" in defaults]
    for word in words:
        key, _, value = (part.strip() for part in word.partition("="))
        if key == "method" and value not in adapters:
            raise DroppeftError(
                "estimate and profile look at a step of the configured adapter, whatever the "
                "method makes of it; leave method out, and set adapter.*"
            )
        if key != "method" and not key.startswith(COSTLY):
            raise DroppeftError(f"{key} has no effect on what a step costs; leave it out")


def _unread(config: Config) -> NoEffect:
    """The rule about tables that other methods read and the configuration's does not."""
    optional = frozenset[str]().union(*(other.tables for other in METHODS.values()))
    tables = optional - method_named(config.method).tables
    return NoEffect(
        keys=tuple(f"{table}." for table in sorted(tables)),
        when=lambda config: True,
        reason="method={config.method}",
    )


def _check_frozen(config: Config) -> None:
    """Virtual tokens stand before the first layer: then its output is not the text's alone."""
    name, layers = config.adapter.type, config.frozen.layers
    if layers and TYPES[name].kind != "layered":
        raise DroppeftError(
            f"frozen.layers={layers} needs an adapter in the layers behind, and {name} is not in a "
            "layer; choose another adapter.type, or frozen.layers=0"
        )


def _check_measured(method: Method, config: Config) -> None:
    """Refuse a run that would end without any accuracy."""
    if not (method.has_global_model(config) or config.evaluation.personalised):
        raise DroppeftError(
            f"method={config.method} has no global model with these settings, and no accuracy but "
            "the personalised one; leave out evaluation.personalised=false"
        )
