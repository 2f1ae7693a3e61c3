"""Adaptive: the bandit finds how many of the upper layers each kind of client trains. Ours.

The lower half of the layers is frozen for everybody; of the upper ones a client trains all, or
those above a prefix. Nothing is dropped and everything is shared. It is what remained of
`droppeft` when each of its parts had been taken away in turn (docs/findings.md).
"""

from dataclasses import replace

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.methods.droppeft import DROPPEFT


def _check(config: Config) -> None:
    """Refuse settings with which it would be another method.

    Raises:
        DroppeftError: no bandit, or arms that drop layers.
    """
    settings = config.configurator
    if settings.policy == "fixed":
        raise DroppeftError(
            "method=adaptive finds the depth while it trains; leave configurator.policy=fixed out, "
            "or set method=fedlora"
        )
    if any(settings.means) or settings.refresh:
        name = "means" if any(settings.means) else "refresh"
        raise DroppeftError(
            f"method=adaptive drops no layers; leave configurator.{name} out, or set "
            "method=droppeft"
        )


ADAPTIVE = replace(
    DROPPEFT,
    name="adaptive",
    summary="depth per kind of client, found by a bandit; all layers shared, none dropped",
    tables=frozenset({"configurator", "frozen", "server"}),
    check=_check,
    has_global_model=lambda config: True,
)
