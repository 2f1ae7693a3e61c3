"""Criteria by which a client scores its layers: what scores highest, it keeps to itself.

Sources: ``gradient_norm`` is DropPEFT's (arXiv:2503.10217: layers with larger gradient norms are
more sensitive and stay personal); ``block_influence`` is ShortGPT's (arXiv:2403.03853); ``cka``
rests on linear CKA (arXiv:1905.00414), without its bias (arXiv:2010.15327); ``fisher`` is a
stand-in for the trace of the Fisher information, from gradients of whole mini-batches. The others,
and the use of all but the first for sharing, are ours or controls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from droppeft.training.gradients import GradientMoments, Vector

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
class LocalResult:
    """What criteria can ask of a turn; what runs the model is only run when it is asked for.

    Attributes:
        active_steps: of each of the L layers.
        gradients: of the turn's steps.
        change: (L,) norm of what the turn changed in each layer's adapter.
        seen: of each of the L blocks, at full depth, on validation rows.
        undone: of each layer of a list, the loss on validation rows when it alone goes back to the
            values that the turn began with, less the loss with what the turn made of all.
        moved: layers that were trained and ran: those that there is a choice about.
        rng: of this client's result.
        usual: (L,) what other clients' gradient norms are like, 0 where that is not known; ``None``
            without any.
    """

    active_steps: Vector
    gradients: GradientMoments
    change: Callable[[], Vector]
    seen: Callable[[], Sequence[Seen]]
    undone: Callable[[Sequence[int]], Sequence[float]]
    moved: tuple[int, ...]
    rng: np.random.Generator
    typical: Vector | None = None


@dataclass(frozen=True)
class Criterion:
    """One way to score layers.

    Attributes:
        summary: one line for people.
        score: (L,) of a turn; higher is kept.
        runs_model: forwards on validation rows, which are charged to the clock: none, one per
            row, or one per row and one more per row and layer.
        reads: what has to be collected for it besides the gradients' norms: the mean gradient, or
            the values that the turn begins with.
        compares: with what other clients' gradients are like, which the server then tells.
    """

    summary: str
    score: Callable[[LocalResult], Vector]
    runs_model: Literal["no", "once", "per layer"] = "no"
    reads: Literal["", "mean gradient", "start"] = ""
    compares: bool = False


CKA_ROWS = 4
"""With fewer things its estimate without bias divides by nothing."""


def linear_cka(one: Matrix, other: Matrix) -> float:
    """Similarity of two representations (n, H) of the same n things: 1 the same, 0 unrelated.

    Source: centred kernel alignment (arXiv:1905.00414) with linear kernels and the unbiased HSIC of
    arXiv:2010.15327, equation 3: with fewer things than dimensions the biased one takes everything
    for alike. 1 with fewer than four things, or where either does not vary.
    """
    if len(one) < CKA_ROWS:
        return 1.0
    grams = [states @ states.T for states in (one, other)]  # n by n: n is small, H is not
    for gram in grams:
        np.fill_diagonal(gram, 0.0)
    x, y = grams
    size = _hsic(x, x) * _hsic(y, y)
    return float(_hsic(x, y) / np.sqrt(size)) if size > 0 else 1.0


def _hsic(x: Matrix, y: Matrix) -> float:
    n = len(x)
    found = (x * y).sum() + x.sum() * y.sum() / ((n - 1) * (n - 2))
    return float(found - 2 / (n - 2) * (x.sum(axis=0) @ y.sum(axis=1))) / (n * (n - 3))


def _signal_to_noise(result: LocalResult) -> Vector:
    """Square of the true mean gradient through the variance of a step's; 0 with a single step.

    Estimated without bias: the mean of n steps of nothing but noise has a square too, a part of
    the variance that is larger for layers that ran less.
    """
    squares, square_of_mean = result.gradients.square, result.gradients.square_of_mean
    assert square_of_mean is not None
    steps = np.maximum(result.active_steps, 1)
    noise = (squares - square_of_mean) * steps / np.maximum(steps - 1, 1)
    signal = np.maximum(square_of_mean - noise / steps, 0.0)
    found: Vector = np.where(steps > 1, signal / np.maximum(noise, 1e-12 * squares + 1e-300), 0.0)
    return found


def _relative(result: LocalResult) -> Vector:
    """Through what is usual in the layer; where that is not known, through what is on average."""
    norm, typical = result.gradients.norm, result.typical
    if typical is None or not typical.any():
        return norm
    found: Vector = norm / np.where(typical > 0, typical, typical[typical > 0].mean())
    return found


FITS = 30
"""Each takes a part of the error off; the first is exact where all clients trained all layers."""


def typical_norms(norms: Sequence[Sequence[float]]) -> tuple[float, ...] | None:
    """Of each layer, what clients' gradient norms in it are like; 1 on average.

    A norm is taken for what is usual in the layer, times how large the client's gradients are
    altogether, times what is unusual: both factors are fitted in result, so that clients that
    trained different layers can be compared.

    Args:
        norms: L of every client, 0 in a layer that it did not train or run, which does not count.

    Returns:
        0 for a layer that no client knows; ``None`` if there is none that one knows.
    """
    table = np.array(norms, dtype=np.float64)
    table = table[table.any(axis=1)] if table.size else table
    if not table.size:
        return None
    known = table > 0
    typical: Vector = np.asarray(known.any(axis=0), dtype=np.float64)
    for _ in range(FITS):
        size = table.sum(axis=1, keepdims=True) / (known * typical).sum(axis=1, keepdims=True)
        fitted: Vector = (table / size).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        typical = np.divide(fitted, fitted[fitted > 0].mean())
    return tuple(typical.tolist())


def _undone(result: LocalResult) -> Vector:
    scores = np.zeros(len(result.active_steps))
    scores[list(result.moved)] = result.undone(result.moved)
    return scores


CRITERIA: Mapping[str, Criterion] = {
    "gradient_norm": Criterion(
        "norm of its adapter's gradient, mean over the steps it ran in",
        lambda result: result.gradients.norm,
    ),
    "relative_gradient_norm": Criterion(
        "that norm through what it usually is in the layer: what is unusual about the client",
        _relative,
        compares=True,
    ),
    "fisher": Criterion(
        "square of that norm, mean over those steps: a stand-in for the Fisher information",
        lambda result: result.gradients.square,
    ),
    "gradient_snr": Criterion(
        "how much the gradients of its steps agree: square of their mean through their variance",
        _signal_to_noise,
        reads="mean gradient",
    ),
    "weight_change": Criterion(
        "how far the turn moved its adapter, through the steps it ran in",
        lambda result: result.change() / np.maximum(result.active_steps, 1),
        reads="start",
    ),
    "block_influence": Criterion(
        "how much the block turns a token's state: one minus the cosine",
        lambda result: np.array([1 - seen.cosine for seen in result.seen()]),
        runs_model="once",
    ),
    "cka": Criterion(
        "how much the block changes what rows have in common: one minus linear CKA",
        lambda result: np.array([1 - linear_cka(one.before, one.after) for one in result.seen()]),
        runs_model="once",
    ),
    "leave_one_out": Criterion(
        "what the client would lose without the turn's change of it: an oracle, and dear",
        _undone,
        runs_model="per layer",
        reads="start",
    ),
    "random": Criterion(
        "by lot: a control", lambda result: result.rng.random(len(result.active_steps))
    ),
    "position": Criterion(
        "its place: the lower layers are shared, the same ones always",
        lambda result: np.arange(len(result.active_steps), dtype=np.float64),
    ),
}
"""By name; adding one is a line here, a word in the configuration and a row in its test."""


def scores_of(name: str, result: LocalResult) -> tuple[float, ...]:
    """Scores of all L layers; 0 where there is no choice.

    Args:
        name: a key of :data:`CRITERIA`.
    """
    found = np.zeros(len(result.active_steps))
    moved = list(result.moved)
    found[moved] = CRITERIA[name].score(result)[moved]
    return tuple(float(score) for score in found)
