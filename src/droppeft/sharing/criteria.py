"""Criteria by which a device scores its layers: what scores highest, it keeps to itself.

Sources: ``gradient_norm`` is DropPEFT's (arXiv:2503.10217: layers with larger gradient norms are
more sensitive and stay personal); ``block_influence`` is ShortGPT's (arXiv:2403.03853); ``cka``
rests on linear CKA (arXiv:1905.00414), ``fisher`` on the empirical Fisher information of
mini-batches. The others, and the use of all but the first for sharing, are ours or controls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from droppeft.gradients import Moments

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What a block makes of some rows.

    Attributes:
        cosine: of a token's state before and after it, mean over the rows' real tokens.
        before, after: (rows, H) mean states of the rows.
    """

    cosine: float
    before: Matrix
    after: Matrix


@dataclass(frozen=True)
class Turn:
    """What criteria can ask of a turn; what runs the model is only run when it is asked for.

    Attributes:
        active_steps: of each of the L layers.
        gradients: of the turn's steps.
        change: (L,) norm of what the turn changed in each layer's adapter.
        seen: of each of the L blocks, at full depth, on validation rows.
        undone: of each layer of a list, the loss on validation rows when it alone goes back to the
            values that the turn began with, less the loss with what the turn made of all.
        layers: those that have an adapter and were trained.
        rng: of this device's turn.
    """

    active_steps: Vector
    gradients: Moments
    change: Callable[[], Vector]
    seen: Callable[[], Sequence[Seen]]
    undone: Callable[[Sequence[int]], Sequence[float]]
    layers: tuple[int, ...]
    rng: np.random.Generator


@dataclass(frozen=True)
class Criterion:
    """One way to score layers.

    Attributes:
        summary: one line for people.
        score: (L,) of a turn; higher is kept.
        of: ``"steps"``: a layer that no step ran, or that was not trained, has no score;
            ``"model"``: every layer has one.
        runs_model: forwards on validation rows, which are charged to the clock: none, one per
            row, or one per row and layer.
        reads: what has to be collected for it besides the gradients' norms: the mean gradient, or
            the values that the turn begins with.
    """

    summary: str
    score: Callable[[Turn], Vector]
    of: Literal["steps", "model"] = "steps"
    runs_model: Literal["no", "once", "per layer"] = "no"
    reads: Literal["", "mean gradient", "start"] = ""


def linear_cka(one: Matrix, other: Matrix) -> float:
    """Similarity of two representations (n, H) of the same n things: 1 the same, 0 unrelated.

    Source: Kornblith et al., arXiv:1905.00414, equation 4 with linear kernels. 1 where either does
    not vary.
    """
    x, y = one - one.mean(axis=0), other - other.mean(axis=0)
    gram_x, gram_y = x @ x.T, y @ y.T  # n by n: n is small, H is not
    size = np.linalg.norm(gram_x) * np.linalg.norm(gram_y)
    return float((gram_x * gram_y).sum() / size) if size > 0 else 1.0


def _signal_to_noise(turn: Turn) -> Vector:
    """Square of the mean gradient through the gradients' variance; large with a single step."""
    square_of_mean = turn.gradients.square_of_mean
    assert square_of_mean is not None
    steps = turn.active_steps
    noise = (turn.gradients.square - square_of_mean) * steps / np.maximum(steps - 1, 1)
    return square_of_mean / np.maximum(noise, 1e-12 * turn.gradients.square + 1e-300)


def _undone(turn: Turn) -> Vector:
    scores = np.zeros(len(turn.active_steps))
    scores[list(turn.layers)] = turn.undone(turn.layers)
    return scores


CRITERIA: Mapping[str, Criterion] = {
    "gradient_norm": Criterion(
        "norm of its adapter's gradient, mean over the steps it ran in",
        lambda turn: turn.gradients.norm,
    ),
    "fisher": Criterion(
        "square of that norm: the trace of the empirical Fisher information",
        lambda turn: turn.gradients.square,
    ),
    "gradient_snr": Criterion(
        "how much the gradients of its steps agree: square of their mean through their variance",
        _signal_to_noise,
        reads="mean gradient",
    ),
    "weight_change": Criterion(
        "how far the turn moved its adapter, through the steps it ran in",
        lambda turn: turn.change() / np.maximum(turn.active_steps, 1),
        reads="start",
    ),
    "block_influence": Criterion(
        "how much the block turns a token's state: one minus the cosine",
        lambda turn: np.array([1 - seen.cosine for seen in turn.seen()]),
        of="model",
        runs_model="once",
    ),
    "cka": Criterion(
        "how much the block changes what rows have in common: one minus linear CKA",
        lambda turn: np.array([1 - linear_cka(one.before, one.after) for one in turn.seen()]),
        of="model",
        runs_model="once",
    ),
    "leave_one_out": Criterion(
        "what the device would lose without the turn's change of it: an oracle, and dear",
        _undone,
        runs_model="per layer",
        reads="start",
    ),
    "random": Criterion(
        "by lot: a control", lambda turn: turn.rng.random(len(turn.active_steps)), of="model"
    ),
    "position": Criterion(
        "its place: the lower layers are shared, the same ones always",
        lambda turn: np.arange(len(turn.active_steps), dtype=np.float64),
        of="model",
    ),
}
"""By name; adding one is a line here, a word in the configuration and a row in its test."""


def new_scores(name: str, turn: Turn, before: Sequence[float]) -> tuple[float, ...]:
    """Scores of all L layers; where there is no new one, that of before.

    Args:
        name: a key of :data:`CRITERIA`.
    """
    criterion, found = CRITERIA[name], np.array(before, dtype=np.float64)
    scores = criterion.score(turn)
    known = np.ones(len(found), dtype=bool)
    if criterion.of == "steps":
        known = np.isin(np.arange(len(found)), turn.layers) & (turn.active_steps > 0)
    found[known] = scores[known]
    return tuple(float(score) for score in found)
