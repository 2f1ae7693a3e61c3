"""Criteria by which a client scores its layers; the layers that score highest stay personal.

Sources: ``gradient_norm`` is DropPEFT's (arXiv:2503.10217: layers with larger gradient norms are
more sensitive and stay personal); ``block_influence`` is ShortGPT's (arXiv:2403.03853); ``cka`` is
linear CKA (arXiv:1905.00414) with an unbiased estimator (arXiv:2010.15327); ``fisher`` approximates
the trace of the Fisher information by gradients of whole mini-batches. The others, and the use of
all but the first for sharing, are ours or controls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from droppeft.training.gradients import GradientMoments

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BlockStates:
    """The hidden states before and after a block, on some rows.

    Attributes:
        cosine: cosine similarity of a token's states before and after the block, mean over all
            tokens that are no padding.
        before, after: (rows, H) mean states of the rows.
    """

    cosine: float
    before: Matrix
    after: Matrix


@dataclass(frozen=True)
class LocalResult:
    """What criteria can use of a local training.

    Functions run the model, and do so only when they are called.

    Attributes:
        active_steps: (L,) steps in which each layer ran.
        gradients: moments of the gradients of the steps.
        block_states: returns the hidden states around each of the L blocks, on validation rows and
            with all layers.
        loss_increases: returns for each of some layers by how much the loss on validation rows
            rises if this layer alone gets back its values from before the local training.
        changed_layers: the layers that were trained and ran, which the client chooses among.
        rng: generator for this client and round.
        typical: (L,) typical gradient norms among clients, 0 where none is known, or ``None``.
    """

    active_steps: Vector
    gradients: "GradientMoments"
    block_states: Callable[[], Sequence[BlockStates]]
    loss_increases: Callable[[Sequence[int]], Sequence[float]]
    changed_layers: tuple[int, ...]
    rng: np.random.Generator
    typical: Vector | None = None


@dataclass(frozen=True)
class Criterion:
    """One way to score layers.

    Attributes:
        summary: one line of help.
        score: returns the (L,) scores of a local training; high scores make layers personal.
        runs_model: forward passes on validation rows, which the modelled clock counts: none, one
            per row, or one per row and one more per row and layer.
        needs_start: whether it needs the values that the local training starts with.
        compares: whether it uses the typical gradient norms of clients, which the server sends.
    """

    summary: str
    score: Callable[[LocalResult], Vector]
    runs_model: Literal["no", "once", "per layer"] = "no"
    needs_start: bool = False
    compares: bool = False


SCORE_ROWS = 32
"""Validation rows for the criteria that run the model."""

CKA_ROWS = 4
"""Rows that the unbiased estimate needs; with fewer it would divide by 0."""


def linear_cka(one: Matrix, other: Matrix) -> float:
    """Return the similarity of two representations (n, H) of n rows: 1 equal, 0 unrelated.

    Source: centred kernel alignment (arXiv:1905.00414) with linear kernels and the unbiased HSIC of
    arXiv:2010.15327, equation 3. With fewer rows than dimensions, the biased HSIC makes all
    representations look alike. The result is 1 with fewer than four rows, or if one of the
    representations is the same for all rows.
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
    first_terms = (x * y).sum() + x.sum() * y.sum() / ((n - 1) * (n - 2))
    return float(first_terms - 2 / (n - 2) * (x.sum(axis=0) @ y.sum(axis=1))) / (n * (n - 3))


def _relative(result: LocalResult) -> Vector:
    """Return the gradient norm divided by the layer's typical norm.

    Where the typical norm is not known, the mean of the known ones is used.
    """
    norm, typical = result.gradients.norm, result.typical
    if typical is None or not typical.any():
        return norm
    relative: Vector = norm / np.where(typical > 0, typical, typical[typical > 0].mean())
    return relative


FITS = 30
"""Iterations of the fit. The first is exact if all clients trained all layers."""


def typical_norms(norms: Sequence[Sequence[float]]) -> tuple[float, ...] | None:
    """Return each layer's typical gradient norm among clients; 1 on average over the layers.

    Each norm is modelled as the layer's typical norm, times the overall size of the client's
    gradients, times a residual. The first two factors are fitted alternately, so that clients that
    trained different layers can be compared.

    Args:
        norms: L norms of every client. A layer that the client did not train or run has a 0, which
            is ignored.

    Returns:
        One value per layer, 0 if no client trained it; ``None`` if no layer was trained.
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


def _loss_increases(result: LocalResult) -> Vector:
    scores = np.zeros(len(result.active_steps))
    scores[list(result.changed_layers)] = result.loss_increases(result.changed_layers)
    return scores


CRITERIA: Mapping[str, Criterion] = {
    "gradient_norm": Criterion(
        "norm of the layer's gradient, mean over its active steps",
        lambda result: result.gradients.norm,
    ),
    "relative_gradient_norm": Criterion(
        "the gradient norm divided by the layer's typical gradient norm among clients",
        _relative,
        compares=True,
    ),
    "fisher": Criterion(
        "squared gradient norm, mean over active steps: approximates the Fisher information",
        lambda result: result.gradients.square,
    ),
    "block_influence": Criterion(
        "how much the block changes a token's hidden state: 1 minus the cosine similarity",
        lambda result: np.array([1 - states.cosine for states in result.block_states()]),
        runs_model="once",
    ),
    "cka": Criterion(
        "how much the block changes the similarities of rows: 1 minus linear CKA",
        lambda result: np.array(
            [1 - linear_cka(states.before, states.after) for states in result.block_states()]
        ),
        runs_model="once",
    ),
    "leave_one_out": Criterion(
        "increase of the loss without the layer's change: an oracle, and expensive",
        _loss_increases,
        runs_model="per layer",
        needs_start=True,
    ),
    "random": Criterion(
        "a random score: a control", lambda result: result.rng.random(len(result.active_steps))
    ),
    "position": Criterion(
        "the layer's index: always the same, lower layers are shared",
        lambda result: np.arange(len(result.active_steps), dtype=np.float64),
    ),
}
"""By name. To add one, add an entry here, its name to the configuration, and a case to its test."""


def scores_of(name: str, result: LocalResult) -> tuple[float, ...]:
    """Return the scores of all L layers; 0 for layers that did not change.

    Args:
        name: a key of :data:`CRITERIA`.
    """
    scores = np.zeros(len(result.active_steps))
    changed = list(result.changed_layers)
    scores[changed] = CRITERIA[name].score(result)[changed]
    return tuple(float(score) for score in scores)
