"""The candidates: ways to save work in a training step, as distributions over modes of layers."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gradient_fidelity.layers import IN_FULL_GRADIENT, Mode, Modes
from droppeft.layer_dropout import layer_rates, protected_ends, sample_active

PARTS = {"a sixth": 1 / 6, "a third": 1 / 3, "half": 1 / 2}

FULL = "full depth"


@dataclass(frozen=True)
class Candidate:
    """A way to save work.

    Attributes:
        name: as tables show it.
        choices: modes of the layers; each step draws one entry, each with the same probability.
            Empty if there are too many.
        draw: draws the modes of a step instead.
    """

    name: str
    choices: tuple[Modes, ...] = ()
    draw: Callable[[random.Random], Modes] | None = None

    def draws(self, rng: random.Random, number: int) -> tuple[Modes, ...]:
        """All choices, or so many random draws."""
        if self.draw is None:
            return self.choices
        return tuple(self.draw(rng) for _ in range(number))

    @property
    def is_exact(self) -> bool:
        """Whether the gradients of trained layers are always those of full depth."""
        return bool(self.choices) and all(
            IN_FULL_GRADIENT.issuperset(modes) for modes in self.choices
        )


def candidates(added_losses: Sequence[float]) -> list[Candidate]:
    """All candidates for a model; the first one is full depth.

    Args:
        added_losses: by layer, the loss that is added when it alone is skipped.
    """
    layers = len(added_losses)
    return [
        Candidate(FULL, (_from(0, layers),)),
        *(
            Candidate(
                f"truncated at {shown}",
                tuple(_from(round(start * layers), layers) for start in starts),
            )
            for shown, starts in (
                ("0, 1/3, 2/3, 2/3", (0, 1 / 3, 2 / 3, 2 / 3)),
                ("0, 1/2", (0, 1 / 2)),
            )
        ),
        *(
            Candidate(f"upper {part}{cached}", (_from(round(start * layers), layers, below),))
            for part, start in (("half", 1 / 2), ("third", 2 / 3))
            for cached, below in (("", Mode.FORWARD), (", cached", Mode.CACHED))
        ),
        Candidate("half detached", draw=_exact(layers, 1 / 2, "uniform", Mode.DETACHED)),
        *(
            Candidate(f"{part} skipped, {shape}", draw=_exact(layers, rate, shape, Mode.SKIP))
            for shape in ("uniform", "incremental")
            for part, rate in PARTS.items()
        ),
        *(
            Candidate(f"{part} skipped, calibrated", draw=_least(added_losses, PARTS[part]))
            for part in ("a sixth", "a third")
        ),
        *(
            Candidate(f"{part} as its mean", draw=_exact(layers, PARTS[part], "uniform", Mode.MEAN))
            for part in ("a third", "half")
        ),
    ]


def _from(start: int, layers: int, below: Mode = Mode.FORWARD) -> Modes:
    return (below,) * start + (Mode.TRAIN,) * (layers - start)


def _exact(layers: int, mean: float, shape: str, mode: Mode) -> Callable[[random.Random], Modes]:
    """An exact number of layers in a mode; the first and the last layer are protected."""
    rates = layer_rates(mean, shape, layers, protected=protected_ends(layers, 1, 1))

    def draw(rng: random.Random) -> Modes:
        return tuple(Mode.TRAIN if runs else mode for runs in sample_active(rates, "exact", rng))

    return draw


def _least(added_losses: Sequence[float], share: float) -> Callable[[random.Random], Modes]:
    """Skip so many layers, drawn from twice as many that add the smallest loss when skipped."""
    layers = len(added_losses)
    number = round(share * layers)
    pool = sorted(range(layers), key=lambda layer: added_losses[layer])[: 2 * number]

    def draw(rng: random.Random) -> Modes:
        skipped = rng.sample(pool, number)
        return tuple(Mode.SKIP if layer in skipped else Mode.TRAIN for layer in range(layers))

    return draw
