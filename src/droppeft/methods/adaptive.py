"""Adaptive: the bandit finds how many layers the clients of each device profile train. Ours.

By default the lower half of the layers is frozen on all clients, and a client trains all or only
the last of the upper layers. No layer is dropped, and all trained layers are shared. The method is
what remained of `droppeft` after its parts had been removed one by one
(docs/benchmarks/ablation.md).
"""

from dataclasses import replace

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.methods.droppeft import DROPPEFT


def _check(config: Config) -> None:
    """Refuse settings that make it another method.

    Raises:
        DroppeftError: if there is no bandit, or if its arms may drop layers.
    """
    settings = config.configurator
    if settings.policy == "fixed":
        raise DroppeftError(
            "method=adaptive needs a configurator; leave configurator.policy=fixed out, or set "
            "method=fedlora"
        )
    if any(settings.means):
        raise DroppeftError(
            "method=adaptive drops no layers; leave configurator.means out, or set method=droppeft"
        )


ADAPTIVE = replace(
    DROPPEFT,
    name="adaptive",
    summary="the upper half of the layers, as many as a bandit finds best for each kind of device",
    tables=frozenset({"configurator", "frozen", "server"}),
    check=_check,
    has_global_model=lambda config: True,
    sent=None,
)
