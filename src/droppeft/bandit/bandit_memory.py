"""What the bandit remembers between rounds, and how it learns at the end of a round. Ours."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from droppeft.bandit.arms import Arm
from droppeft.bandit.layer_values import LayerValues
from droppeft.bandit.learning import WINDOW, Estimate, Observation, estimate


@dataclass(frozen=True)
class BanditMemory:
    """What the bandit knows; a part of the server's state.

    Attributes:
        arms: the arms by number.
        observations: observations of the rounds in the window.
        row_length: mean tokens per row in the last round with updates, padding included.
        tried: numbers of all arms that were ever given to a client, whether merged or not.
        layers: what training each layer is worth.
    """

    arms: Mapping[int, Arm]
    observations: tuple[Observation, ...]
    row_length: float
    tried: frozenset[int]
    layers: LayerValues

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the arms, in order."""
        return tuple(self.arms)

    def known(self, window: int = WINDOW) -> Estimate:
        """Estimate of the arms, in order, from the last ``window`` rounds."""
        last = max((observation.round for observation in self.observations), default=0)
        return estimate(self.observations, self.numbers, last, window)


def begin(arms: Sequence[Arm], row_length: float, num_layers: int) -> BanditMemory:
    """The memory before the first round: the candidates, and no observations."""
    layers = LayerValues.unknown(num_layers)
    return BanditMemory(dict(enumerate(arms)), (), row_length, frozenset(), layers)


def with_round(
    memory: BanditMemory,
    observations: Sequence[Observation],
    round: int,
    row_length: float | None,
    given: Collection[int] = (),
    window: int = WINDOW,
) -> BanditMemory:
    """Add the results of a round, and forget observations that are older than the window.

    Args:
        row_length: mean tokens per row in the round, ``None`` if nothing was merged.
        given: numbers of the arms that clients were given, besides those of the observations.
    """
    recent = [
        observation for observation in memory.observations if observation.round > round - window
    ]
    return replace(
        memory,
        observations=(*recent, *observations),
        tried=memory.tried | {observation.arm for observation in observations} | set(given),
        row_length=memory.row_length if row_length is None else row_length,
    )
