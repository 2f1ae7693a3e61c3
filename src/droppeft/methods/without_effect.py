"""Settings that have no effect in a configuration, and why. Ours.

A setting counts as given only if it differs from its default, even if it is written down: the
``config.toml`` of a run lists every setting, and it must be possible to repeat the run with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from droppeft.adapters.types import adapter_type
from droppeft.config import Config, as_tree, build_config, flat
from droppeft.methods import METHODS, method_named
from droppeft.sharing.bounding import FEWEST
from droppeft.sharing.direction_check import FEWEST_DIRECTIONS

if TYPE_CHECKING:
    from droppeft.tasks.task import Task


@dataclass(frozen=True)
class NoEffect:
    """Settings that have no effect in some configurations.

    Attributes:
        keys: keys of the settings; a key that ends with a dot stands for a whole table.
        when: whether the settings have no effect in a configuration.
        reason: continues the sentence "has no effect with"; ``{config...}`` is filled in.
        instead: what to do.
        only_if_table_read: the rule holds only for methods that use this table; ``None`` for all
            methods.
        except_keys: keys of the table that do have an effect.
    """

    keys: tuple[str, ...]
    when: Callable[[Config], bool]
    reason: str
    instead: str = "leave it out"
    only_if_table_read: str | None = None
    except_keys: tuple[str, ...] = ()

    def concerns(self, key: str) -> bool:
        """Whether the rule is about this setting."""
        tables = tuple(name for name in self.keys if name.endswith("."))
        return (key in self.keys or key.startswith(tables)) and key not in self.except_keys

    def holds(self, config: Config) -> bool:
        """Whether the rule applies to a configuration."""
        reads = (
            self.only_if_table_read is None
            or self.only_if_table_read in method_named(config.method).tables
        )
        return reads and self.when(config)


BOUNDS = (
    *("server.clip_norm_multiple", "server.max_weight_multiple"),
    *("server.direction_check", "server.merge"),
)
"""Settings of the table ``server`` that concern every method that merges, with the next one."""

OPTIMIZER = ("server.optimizer", "server.step_size")
"""Settings of the table ``server`` that only methods have which list it in their ``tables``."""

NO_EFFECT = (
    NoEffect(
        keys=("configurator.",),
        except_keys=("configurator.policy",),
        only_if_table_read="configurator",
        when=lambda config: config.configurator.policy == "fixed",
        reason="configurator.policy={config.configurator.policy}",
        instead="leave it out, or set another policy",
    ),
    NoEffect(
        keys=("configurator.steps",),
        only_if_table_read="configurator",
        when=lambda config: config.training.local_steps is None,
        reason="training.local_epochs={config.training.local_epochs}; they are shares of "
        "training.local_steps",
    ),
    NoEffect(
        keys=("configurator.depths",),
        only_if_table_read="configurator",
        when=lambda config: adapter_type(config.adapter.type).kind != "layered",
        reason="adapter.type={config.adapter.type}, which is trained through all layers",
    ),
    NoEffect(
        keys=("configurator.reward",),
        only_if_table_read="configurator",
        when=lambda config: config.configurator.policy == "layer_values",
        reason="configurator.policy=layer_values, which needs no rewards of arms",
    ),
    NoEffect(
        keys=(
            *("dropout.mean", "dropout.count", "dropout.rates", "dropout.schedule"),
            "backward.depths",
        ),
        only_if_table_read="configurator",
        when=lambda config: config.configurator.policy != "fixed",
        reason="configurator.policy={config.configurator.policy}, whose arms set it",
        instead="leave it out, or set configurator.policy=fixed",
    ),
    NoEffect(
        keys=("dropout.shape", "dropout.protect_first", "dropout.protect_last"),
        only_if_table_read="dropout",
        when=lambda config: config.dropout.rates is not None,
        reason="dropout.rates, which has the rate of each layer",
    ),
    NoEffect(
        keys=("sharing.criterion", "sharing.hysteresis"),
        only_if_table_read="sharing",
        when=lambda config: config.sharing.fraction == 1,
        reason="sharing.fraction=1, where all layers are shared",
        instead="leave it out, or set a smaller fraction",
    ),
    NoEffect(
        keys=("sharing.hysteresis",),
        only_if_table_read="sharing",
        when=lambda config: config.sharing.criterion == "position",
        reason="sharing.criterion=position, whose scores never change",
    ),
    NoEffect(
        keys=BOUNDS,
        when=lambda config: config.method in ("local", "centralised"),
        reason="method={config.method}, which does not merge the updates of several clients",
    ),
    NoEffect(
        keys=BOUNDS,
        when=lambda config: config.privacy.is_on,
        reason="privacy.epsilon or privacy.noise_multiplier, which clip each change to "
        "privacy.clip_norm and give no update a weight",
    ),
    NoEffect(
        keys=("server.clip_norm_multiple",),
        when=lambda config: 0 < config.cohort_size < FEWEST,
        reason="cohort_size={config.cohort_size}, because fewer than three updates are not clipped",
        instead="leave it out, or raise cohort_size",
    ),
    NoEffect(
        keys=("server.direction_check",),
        when=lambda config: 0 < config.cohort_size < FEWEST_DIRECTIONS,
        reason="cohort_size={config.cohort_size}, because the directions of fewer than 20 "
        "updates are not compared",
        instead="leave it out, or raise cohort_size",
    ),
    NoEffect(
        keys=("server.malicious_fraction",),
        when=lambda config: config.server.merge in ("mean", "median"),
        reason="server.merge={config.server.merge}",
        instead="leave it out, or set server.merge=trimmed_mean, krum or multi_krum",
    ),
    NoEffect(
        keys=("server.step_size",),
        only_if_table_read="server",
        when=lambda config: config.server.optimizer == "none",
        reason="server.optimizer={config.server.optimizer}",
        instead="leave it out, or set another server.optimizer",
    ),
    NoEffect(
        keys=(
            *("training.loss_on", "source.prompt", "source.completion"),
            *("evaluation.generated", "evaluation.personalised_generated"),
            "evaluation.max_new_tokens",
        ),
        when=lambda config: not _task(config.task).generates,
        reason="task={config.task}",
        instead="leave it out, or set task=causal_lm",
    ),
    NoEffect(
        keys=("evaluation.mistakes",),
        when=lambda config: _task(config.task).generates,
        reason="task={config.task}",
    ),
    NoEffect(
        keys=("evaluation.mistakes",),
        when=lambda config: not method_named(config.method).has_global_model(config),
        reason="method={config.method}, which gives no global model with these settings",
    ),
    NoEffect(
        keys=("evaluation.personalised_generated",),
        when=lambda config: not config.evaluation.personalised,
        reason="evaluation.personalised=false",
        instead="leave one of the two out",
    ),
    NoEffect(
        keys=("training.loraplus_lr_ratio",),
        when=lambda config: config.adapter.type != "lora",
        reason="adapter.type={config.adapter.type}, which has no B",
    ),
    NoEffect(
        keys=("training.head_learning_rate",),
        when=lambda config: config.task == "causal_lm",
        reason="task=causal_lm, whose head is not trained",
    ),
    NoEffect(
        keys=(
            *("partition.alpha", "partition.classes_per_client", "partition.key"),
            *("partition.validation_fraction", "partition.test_fraction"),
            *("partition.min_rows", "partition.small"),
            *("source.train", "source.max_train_rows"),
        ),
        when=lambda config: config.partition.kind == "sites",
        reason="partition.kind=sites, where the rows to train on are the sites' own",
        instead="leave it out, or write it in the node files",
    ),
    NoEffect(
        keys=("source.classes",),
        when=lambda config: config.partition.kind != "sites" or _task(config.task).generates,
        reason="task={config.task} and partition.kind={config.partition.kind}",
    ),
    NoEffect(
        keys=("privacy.",),
        when=lambda config: not config.privacy.is_on,
        reason="neither privacy.epsilon nor privacy.noise_multiplier",
        instead="give one of these two, or leave it out",
    ),
    NoEffect(
        keys=("flower.",),
        when=lambda config: config.transport != "flower",
        reason="transport={config.transport}",
    ),
)
"""If several rules hold for a setting, the first is reported."""


def without_effect(config: Config) -> dict[str, NoEffect]:
    """The given settings that have no effect, each with the rule that says so.

    Raises:
        DroppeftError: if the method is unknown.
    """
    rules = (*_unread(config), *NO_EFFECT)
    ignored: dict[str, NoEffect] = {}
    for key in given(config):
        for rule in rules:
            if rule.concerns(key) and rule.holds(config):
                ignored.setdefault(key, rule)
    return ignored


def reason_of(rule: NoEffect, config: Config) -> str:
    """Why a rule's settings have no effect in a configuration."""
    return rule.reason.format(config=config)


def given(config: Config) -> Mapping[str, Any]:
    """Settings by dotted key that differ from the defaults of the method, task and data."""
    named: dict[str, Any] = {"method": config.method, "task": config.task, "data": config.data}
    if config.partition.kind == "sites":
        named |= {"partition": {"kind": "sites"}, "clients": config.clients}
    defaults = {**flat(as_tree(build_config(named))), "data": build_config({}).data}
    if config.partition.kind == "natural":
        defaults["partition.small"] = "leave_out"  # the default of this kind
    return {
        key: value
        for key, value in flat(as_tree(config)).items()
        if key not in defaults or defaults[key] != value
    }


def _unread(config: Config) -> list[NoEffect]:
    """The rules about tables that only other methods use, one per table."""
    users = {table: name for name in reversed(METHODS) for table in METHODS[name].tables}
    return [
        NoEffect(
            keys=OPTIMIZER if table == "server" else (f"{table}.",),
            when=lambda config: True,
            reason="method={config.method}",
            instead=f"leave it out, or set method={users[table]}",
        )
        for table in sorted(users.keys() - method_named(config.method).tables)
    ]


def _task(name: str) -> "Task":
    from droppeft.tasks.registry import task_named  # tasks import PyTorch and transformers

    return task_named(name)
