"""What a turn's sharing is expected to cost before the client has chosen its layers. Ours."""

from droppeft.config import Config
from droppeft.config.sharing import SharingConfig
from droppeft.messages import HEAD, Tensors, payload_bytes
from droppeft.sharing.criteria import CRITERIA
from droppeft.sharing.selection import count_of


def typical_bytes(config: Config, values: Tensors, lower: int = 0) -> float:
    """Of a turn's values that travel one way, on average over the layers.

    A client that never took part downloads more, whatever its arm.

    Args:
        values: of the global model.
        lower: layers below it do not travel; the fraction is of the others.
    """
    layers = [key for key in values if isinstance(key, int) and key >= lower]
    part = count_of(config.sharing.fraction, len(layers)) / max(len(layers), 1)
    found = 0.0
    for key, named in values.items():
        size = payload_bytes({key: named})
        if isinstance(key, int):
            found += part * size if key >= lower else 0
        elif key != HEAD or config.sharing.head == "shared":
            found += size
    return found


def scored_rows(settings: SharingConfig, layers: int) -> int:
    """Forwards of rows that scoring a turn's layers takes, if a client has so many rows.

    Args:
        layers: how many are trained.
    """
    if not 0 < count_of(settings.fraction, layers) < layers:
        return 0
    times = {"no": 0, "once": 1, "per layer": layers + 1}
    return times[CRITERIA[settings.criterion].runs_model] * settings.score_rows
