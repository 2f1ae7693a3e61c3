"""Expected cost of sharing, before a client has chosen its layers. Ours."""

from droppeft.config import Config
from droppeft.config.sharing import SharingConfig
from droppeft.messages.encoding import tensor_bytes
from droppeft.messages.tensors import HEAD, Tensors
from droppeft.sharing.criteria import CRITERIA, SCORE_ROWS
from droppeft.sharing.selection import count_of


def typical_bytes(config: Config, values: Tensors, lower: int = 0) -> float:
    """Return the expected bytes of tensors that a local training sends in one direction.

    The size of the shared layers is a mean, since the client has not chosen them yet.

    In its first participation a client downloads more, whatever its arm.

    Args:
        values: tensors of the global model.
        lower: layers below this index are not sent; the client shares a fraction of the others.
    """
    layers = [key for key in values if isinstance(key, int) and key >= lower]
    shared_part = count_of(config.sharing.fraction, len(layers)) / max(len(layers), 1)
    total = 0.0
    for key, named in values.items():
        size = tensor_bytes({key: named}, config.traffic.encoding)
        if isinstance(key, int):
            total += shared_part * size if key >= lower else 0
        elif key != HEAD or config.sharing.head == "shared":
            total += size
    return total


def scored_rows(settings: SharingConfig, layers: int) -> int:
    """Return how many rows are passed forward to score layers, if the client has enough rows.

    Args:
        layers: number of trained layers.
    """
    if not 0 < count_of(settings.fraction, layers) < layers:
        return 0
    passes = {"no": 0, "once": 1, "per layer": layers + 1}
    return passes[CRITERIA[settings.criterion].runs_model] * SCORE_ROWS
