"""Rules that a configuration must satisfy, checked before a model is loaded. Ours.

:mod:`droppeft.config` checks single values and values that limit each other. A method's ``init``
checks what depends on the number of layers. All other rules are here or in a method's ``check``.
They hold for overrides, TOML files, comparisons and Python alike. PyTorch is not imported unless a
rule needs it, so that a mistake is answered at once. :mod:`droppeft.methods.without_effect` knows
which settings would be ignored.
"""

from droppeft.adapters.settings import check
from droppeft.adapters.types import check_on
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.federated_method import Method, adapter_spec
from droppeft.methods import METHODS, method_named
from droppeft.methods.privacy_rules import check_privacy
from droppeft.methods.step_rules import check_layered, check_offload
from droppeft.methods.without_effect import reason_of, without_effect
from droppeft.sharing.bounding import FEWEST
from droppeft.sharing.merge_rules import COORDINATE_RULES


def check_settings(config: Config) -> None:
    """Refuse settings that cannot work or would be ignored.

    Raises:
        DroppeftError: if the method is unknown, a given setting has no effect, or settings are
            incompatible; the message names the setting and says what to do.
    """
    method = method_named(config.method)
    for key, rule in without_effect(config).items():
        raise DroppeftError(f"{key} has no effect with {reason_of(rule, config)}; {rule.instead}")
    check(adapter_spec(config.adapter, num_layers=1))
    check_on(config.adapter.type, config.adapter.options, config.quantization)
    check_offload(config)
    check_layered(config)
    check_privacy(method, METHODS, config)
    _check_measured(method, config)
    _check_lora(method, config)
    _check_merge(method, config)
    check_target(config.target, config.task)
    _check_calibrated(config)
    if config.partition.kind == "sites":
        from droppeft.client.site_rules import check_least_rows  # imports PyTorch

        check_least_rows(config)
    method.check(config)
    _check_configurator(method, config)


def _check_configurator(method: Method, config: Config) -> None:
    """Refuse arms that a policy cannot judge."""
    settings = config.configurator
    if "configurator" not in method.tables or settings.policy == "fixed":
        return
    if settings.policy == "layer_values" and any(settings.means):
        raise DroppeftError(
            "configurator.policy=layer_values cannot tell what dropping layers is worth; set "
            "configurator.means=[0], or another policy"
        )


def _check_lora(method: Method, config: Config) -> None:
    """Refuse adapters in which a method's arithmetic with LoRA's A and B does not hold."""
    chosen, known = config.adapter, method.lora_options
    if known is None:
        return
    if chosen.type != "lora":
        raise DroppeftError(
            f"method={method.name} computes with LoRA's A and B, but adapter.type={chosen.type} "
            "has none; set adapter.type=lora"
        )
    for option in sorted(name for name, value in chosen.options.items() if value):
        if option not in known:
            raise DroppeftError(
                f"method={method.name} computes with LoRA's A and B, and its computation does not "
                f"hold with adapter.options.{option}; leave adapter.options.{option} out, or set "
                "method=fedlora"
            )


def _check_calibrated(config: Config) -> None:
    """Refuse rates that are measured on training rows where the server has none."""
    if config.calibrates and config.partition.kind == "sites":
        raise DroppeftError(
            "dropout.shape=calibrated needs training rows on the server, which has none with "
            "partition.kind=sites; measure the layers on rows of your own with `droppeft calibrate "
            "MODEL DATA`, and give the dropout.rates that it prints"
        )


def _check_merge(method: Method, config: Config) -> None:
    """Refuse a merge rule that needs more updates, or whose result the method would misread."""
    rule = config.server.merge
    if rule == "mean":
        return
    if 0 < config.cohort_size < FEWEST:
        raise DroppeftError(
            f"server.merge={rule} needs {FEWEST} updates in a round, but cohort_size="
            f"{config.cohort_size}; raise cohort_size, or leave server.merge out"
        )
    settings = config.configurator
    if rule not in COORDINATE_RULES or "configurator" not in method.tables:
        return
    if settings.policy == "layer_values":
        raise DroppeftError(
            f"server.merge={rule} gives all clients the same values, from which "
            "configurator.policy=layer_values cannot tell noise from what layers are worth; set "
            "server.merge=multi_krum, or another policy with configurator.reward=loss"
        )
    if settings.policy != "fixed" and settings.reward == "agreement":
        raise DroppeftError(
            f"server.merge={rule} gives all clients the same values, from which "
            "configurator.reward=agreement learns nothing; set configurator.reward=loss, or "
            "server.merge=multi_krum"
        )


def check_target(target: float | None, task: str, of: str | None = None) -> None:
    """Refuse a target that no model can reach.

    Args:
        target: value of a metric, or ``None``.
        task: name of the task.
        of: name of the metric; the task's primary one if ``None``.

    Raises:
        DroppeftError: the task has no such metric, or the value is out of its range.
    """
    if target is None and of is None:
        return
    from droppeft.tasks.registry import task_named  # tasks import PyTorch and transformers

    metrics = {metric.name: metric for metric in task_named(task).metrics}
    if of is not None and of not in metrics:
        raise DroppeftError(
            f"target.metric={of!r}: task={task} has the metrics {', '.join(metrics)}"
        )
    metric = metrics[of] if of else next(iter(metrics.values()))
    if target is not None and not metric.is_possible(target):
        raise DroppeftError(
            f"target={target:g}: {metric.label} is between 0 and {metric.most:g}; "
            "give a value in this range"
        )


def _check_measured(method: Method, config: Config) -> None:
    """Refuse a run that would not measure any quality."""
    if not (method.has_global_model(config) or config.evaluation.personalised):
        raise DroppeftError(
            f"method={config.method} has no global model with these settings, so that only the "
            "clients' own models can be measured; leave out evaluation.personalised=false"
        )
