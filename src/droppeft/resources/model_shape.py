"""The shape of a model and the checks of a run that need no weights; ours."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from droppeft.adapters.types import check_on
from droppeft.config import Config
from droppeft.costs.fake_step import empty_model
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks
from droppeft.methods.droppeft import configured_rates
from droppeft.methods.step_rules import check_layered, check_offload
from droppeft.models.loading import most_tokens
from droppeft.tasks.registry import task_named

CLASSES = ("no", "yes")
"""Names of the task's classes. With more classes the head would be slightly larger."""


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model, known from its configuration.

    Attributes:
        config: transformers' configuration.
        new_modules: parts of the head that are trained.
        num_layers: L.
        most_tokens: largest number of tokens of a text.
    """

    config: Any
    new_modules: tuple[str, ...]
    num_layers: int
    most_tokens: int


@cache
def model_shape(name: str, task: str) -> ModelShape:
    """The shape of a model, by its name and its task in a run's configuration.

    Raises:
        DroppeftError: an unknown or unsupported model.
    """
    loaded = task_named(task).load_backbone_config(name, CLASSES)
    model = empty_model(loaded.config, task)
    layers = len(find_blocks(model)[1])
    return ModelShape(loaded.config, loaded.new_modules, layers, most_tokens(model))


def check_runnable(config: Config) -> None:
    """Refuse what a run would refuse, as far as the model's configuration tells.

    Raises:
        DroppeftError: the configuration cannot run; the message says what to change.
    """
    shape, kind, frozen = (
        model_shape(config.model, config.task),
        config.adapter.type,
        config.frozen.count,
    )
    if frozen >= shape.num_layers:
        raise DroppeftError(
            f"frozen.layers={frozen} leaves none of the {shape.num_layers} layers to train"
        )
    check_layered(config)
    check_offload(config)
    check_on(kind, config.adapter.options, config.quantization)
    tokens = config.training.max_length + (config.adapter.tokens or 0)
    if tokens > shape.most_tokens:
        raise DroppeftError(
            f"texts of {tokens} tokens (training.max_length and adapter.tokens) are more than the "
            f"{shape.most_tokens} positions of model {config.model}"
        )
    configured_rates(config.dropout, shape.num_layers, frozen)
