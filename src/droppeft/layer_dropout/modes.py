"""The mode of a layer in a training step, and distributions over the modes of all layers.

Source: skipping layers is from DropPEFT (arXiv:2503.10217). The other modes, and a backward pass
whose depth changes from step to step, are ours.
"""

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.gates import sample_active
from droppeft.layer_dropout.rates import explicit_rates


class Mode(Enum):
    """What a layer does in a step.

    ``TRAIN``: it runs forward and backward. ``FORWARD``: it runs forward; nothing is stored for a
    backward pass, and no layer below it is trained. ``CACHED``: it does not run, since the states
    that it would compute are stored. ``SKIP``: it does not run, and its output is its input.
    """

    TRAIN = "train"
    FORWARD = "forward"
    CACHED = "cached"
    SKIP = "skip"


Modes = tuple[Mode, ...]
"""The mode of each of L layers in a step."""


def skipping(active: Iterable[bool]) -> Modes:
    """Return modes in which the layers that are True are trained, and the others skipped."""
    return tuple(Mode.TRAIN if runs else Mode.SKIP for runs in active)


@dataclass(frozen=True)
class LayerModes:
    """A distribution over the modes of L layers, from which every step draws.

    Attributes:
        layers: number of layers L.
        frozen: number of first layers without an adapter. They are never skipped.
        cached: whether the states of the frozen layers are read instead of computed.
        starts: candidates for the lowest trained layer. A step draws one of them, each with the
            same probability; layers below it run forward only.
        rates: (L,) probability of being skipped.
        sampling: how layers are skipped, a key of ``SAMPLINGS``.
        every: steps for which drawn modes are used; ``None`` for a whole local training.
    """

    layers: int
    frozen: int = 0
    cached: bool = False
    starts: tuple[int, ...] = (0,)
    rates: tuple[float, ...] | None = None
    sampling: str = "exact"
    every: int | None = 1

    def __post_init__(self) -> None:
        if not self.starts or not all(0 <= start <= self.layers for start in self.starts):
            raise DroppeftError(
                f"the lowest trained layer of a step is one of {list(self.starts)}; it must be "
                f"between 0 and {self.layers}, where no layer is trained"
            )
        if self.rates is not None:
            explicit_rates(self.rates, self.layers)

    def draw(
        self,
        start_rng: random.Random,
        skip_rng: random.Random,
        *,
        need_one_of: Collection[int] = (),
    ) -> Modes:
        """Draw the modes of a step.

        Args:
            start_rng: draws the lowest trained layer.
            skip_rng: draws which layers are skipped.
            need_one_of: layers of which at least one must be trained, such as those with an adapter
                if nothing else is trained. Layers below the lowest trained one do not count.

        Raises:
            DroppeftError: the step would train nothing; see also
                :func:`~droppeft.layer_dropout.sample_active`.
        """
        start = max(self.frozen, start_rng.choice(self.starts))
        needed = [layer for layer in need_one_of if layer >= start]
        if need_one_of and not needed:
            raise DroppeftError(
                f"a step that trains the layers from {start} on would train nothing, since "
                f"only layers up to {max(need_one_of)} have trained parameters; train more layers"
            )
        active: Sequence[bool] = (True,) * self.layers
        if self.rates is not None:
            active = sample_active(self.rates, self.sampling, skip_rng, need_one_of=needed)
        return tuple(self._mode(layer, start, active[layer]) for layer in range(self.layers))

    def _mode(self, layer: int, start: int, active: bool) -> Mode:
        if layer < self.frozen:
            return Mode.CACHED if self.cached else Mode.FORWARD
        if not active:
            return Mode.SKIP
        return Mode.TRAIN if layer >= start else Mode.FORWARD

    def shares(self) -> dict[Mode, tuple[float, ...]]:
        """For each mode, the expected share of steps in which each of the L layers has it."""
        rates = self.rates or (0.0,) * self.layers
        first = Mode.CACHED if self.cached else Mode.FORWARD
        found = {mode: [0.0] * self.layers for mode in Mode}
        for layer in range(self.layers):
            if layer < self.frozen:
                found[first][layer] = 1.0
                continue
            reached = sum(start <= layer for start in self.starts) / len(self.starts)
            found[Mode.SKIP][layer] = rates[layer]
            found[Mode.TRAIN][layer] = (1 - rates[layer]) * reached
            found[Mode.FORWARD][layer] = (1 - rates[layer]) * (1 - reached)
        return {mode: tuple(values) for mode, values in found.items()}

    def expected(self, trained: Sequence[float], forward: Sequence[float]) -> float:
        """Return the expected sum over layers in a step, such as its FLOPs.

        Args:
            trained: (L,) what a layer adds in a step that trains it.
            forward: (L,) what it adds if it runs forward only. Other layers add nothing.
        """
        shares = self.shares()
        return sum(
            in_train * train + in_forward * only_forward
            for in_train, train, in_forward, only_forward in zip(
                shares[Mode.TRAIN], trained, shares[Mode.FORWARD], forward, strict=True
            )
        )


def starts_of(depths: Sequence[float], layers: int, frozen: int = 0) -> tuple[int, ...]:
    """Return the lowest trained layer for each depth.

    Args:
        depths: fractions of the layers above the frozen ones that are trained, counted from the
            last layer. At least one layer is trained.
        layers: number of layers L.
        frozen: number of frozen layers.

    Raises:
        DroppeftError: a depth is not above 0 and at most 1, or there is none.
    """
    if not depths or not all(0 < depth <= 1 for depth in depths):
        raise DroppeftError(
            f"the depths of the backward pass are {list(depths)}; "
            "each must be above 0 and at most 1"
        )
    above = layers - frozen
    return tuple(layers - max(1, round(depth * above)) for depth in depths)
