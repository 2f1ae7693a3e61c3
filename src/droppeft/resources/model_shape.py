"""What can be said of a run before anything is loaded; ours."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from droppeft.adapters.types import adapter_type, check_on
from droppeft.config import Config
from droppeft.costs.fake_step import empty_model
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks
from droppeft.methods.droppeft import configured_rates
from droppeft.models.loading import load_outline, most_tokens
from droppeft.models.offloading import check_offload

CLASSES = ("no", "yes")
"""Of the task; more of them make the head a little larger."""


@dataclass(frozen=True)
class Outlined:
    """A model, by its configuration.

    Attributes:
        config: transformers' own.
        new_modules: parts of the head that are trained.
        num_layers: L.
        most_tokens: of a text.
    """

    config: Any
    new_modules: tuple[str, ...]
    num_layers: int
    most_tokens: int


@cache
def outlined(name: str) -> Outlined:
    """Look a model up, by its name in a run's configuration.

    Raises:
        DroppeftError: an unknown or unsupported model.
    """
    outline = load_outline(name, CLASSES)
    model = empty_model(outline.config)
    layers = len(find_blocks(model)[1])
    return Outlined(outline.config, outline.new_modules, layers, most_tokens(model))


def check_runnable(config: Config) -> None:
    """Refuse what a run would refuse, as far as the model's configuration tells.

    Raises:
        DroppeftError: with what to change.
    """
    outline, kind, frozen = outlined(config.model), config.adapter.type, config.frozen.count
    if frozen >= outline.num_layers:
        raise DroppeftError(
            f"frozen.layers={frozen} leaves none of the {outline.num_layers} layers to train"
        )
    if frozen and adapter_type(kind).kind != "layered":
        raise DroppeftError(f"frozen.layers={frozen} needs an adapter in the layers, not {kind}")
    check_offload(config)
    check_on(kind, config.adapter.options, config.quantization)
    tokens = config.training.max_length + (config.adapter.tokens or 0)
    if tokens > outline.most_tokens:
        raise DroppeftError(
            f"texts of {tokens} tokens (training.max_length and adapter.tokens) are more than the "
            f"{outline.most_tokens} positions of model {config.model}"
        )
    configured_rates(config.dropout, outline.num_layers, frozen)
