"""The settings of a configuration of which a training step is estimated or measured. Ours."""

from collections.abc import Sequence
from typing import Any

from droppeft.config import Config, DropoutConfig, build_config
from droppeft.config.defaults import METHOD_DEFAULTS
from droppeft.errors import DroppeftError
from droppeft.methods import method_named

STEP_SETTINGS = (
    *("task", "model", "quantization", "accelerator", "threads", "seed"),
    *("adapter.", "backward.", "dropout.", "frozen.", "clock.custom."),
    *("training.batch_size", "training.micro_batch_size", "training.max_length"),
    "training.precision",
    *("training.checkpointing", "training.offload", "training.backbone_dropout"),
)
"""Keys, or beginnings of keys, that change what a step costs or where it is measured."""

STEP_METHOD = "droppeft"
"""The method of a configuration of which a step is estimated or profiled."""


def check_step_settings(overrides: Sequence[str]) -> None:
    """Refuse overrides that do not change what a step costs.

    Settings in a file are not checked, since it may be the configuration of a whole run.

    Args:
        overrides: ``key=value``.

    Raises:
        DroppeftError: if an override has no effect; the message names the setting.
    """
    methods = [name for name, defaults in METHOD_DEFAULTS.items() if "adapter" in defaults]
    for override in overrides:
        key, _, value = (part.strip() for part in override.partition("="))
        if key == "method" and value not in methods:
            raise DroppeftError(
                f"method={value} has no effect on what a step of the configured adapter costs; "
                "leave it out, and set adapter.*"
            )
        if key != "method" and not key.startswith(STEP_SETTINGS):
            raise DroppeftError(f"{key} has no effect on what a step costs; leave it out")


def step_of(config: Config) -> Config:
    """The configuration of which a step is estimated or profiled, whatever its method.

    It has the model, adapter, drop rates and training settings of a run, and :data:`STEP_METHOD`,
    which uses just these. A method that drops no layers has a step at full depth.
    """
    plain = build_config({"method": STEP_METHOD})
    used: dict[str, Any] = {
        "method": plain.method,
        "configurator": plain.configurator,
        "sharing": plain.sharing,
    }
    if "dropout" not in method_named(config.method).tables:
        used["dropout"] = DropoutConfig(mean=0.0)
    elif config.calibrates:
        # What a step costs depends on how many layers run, not on which.
        used["dropout"] = config.dropout.model_copy(update={"shape": "uniform"})
    if "backward" not in method_named(config.method).tables:
        used["backward"] = plain.backward
    return config.model_copy(update=used)
