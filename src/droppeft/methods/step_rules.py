"""Rules about the settings of a training step, for runs, estimates and profiles alike. Ours."""

from droppeft.adapters.types import TYPES
from droppeft.config import Config
from droppeft.errors import DroppeftError


def check_offload(config: Config) -> None:
    """Refuse ``training.offload`` where it would not save memory.

    Raises:
        DroppeftError: the message says what to set.
    """
    if not config.training.offload:
        return
    if config.quantization != "none":
        raise DroppeftError(
            "training.offload=true cannot be combined with "
            f"quantization={config.quantization}; choose one"
        )
    cached = config.frozen.layers != 0 and config.frozen.cache
    if not cached and config.dropout.every != "round":
        raise DroppeftError(
            "training.offload=true saves no memory when every step may run other layers; set "
            "dropout.every=round, or frozen.layers with frozen.cache=true"
        )


def check_layered(config: Config) -> None:
    """Refuse settings of single layers with virtual tokens, on which all layers depend.

    Raises:
        DroppeftError: the message says what to set.
    """
    name, layers = config.adapter.type, config.frozen.layers
    if TYPES[name].kind == "layered":
        return
    if layers:
        raise DroppeftError(
            f"frozen.layers={layers} needs an adapter inside layers, but {name} is not in a layer; "
            "set another adapter.type, or frozen.layers=0"
        )
    if min(config.backward.depths) < 1:
        raise DroppeftError(
            f"backward.depths below 1 need an adapter inside layers, but {name} is not in a layer; "
            "set another adapter.type, or leave backward.depths out"
        )
