"""From scores and seconds to an arm for each client: most reward per second of the round. Ours."""

import numpy as np
import numpy.typing as npt

from droppeft.bandit.learning import LEAST
from droppeft.bandit.policies import FORCED, ScoredArms
from droppeft.errors import DroppeftError

Matrix = npt.NDArray[np.float64]


def choose_together(
    scored: ScoredArms, seconds: Matrix, fits: npt.NDArray[np.bool_]
) -> tuple[int, ...]:
    """Choose for a cohort whose slowest member ends the round.

    For a round of T seconds each client takes the best score among its arms that end by T; of all
    T that has the largest sum of scores per second. A client that explores takes what it must.

    Args:
        scored: of (clients, A).
        seconds: (clients, A) what a turn takes.
        fits: (clients, A) whether the client has the memory.

    Returns:
        An arm's place for every client; of equally good ones the first.

    Raises:
        DroppeftError: no arm fits a device.
    """
    scores = _allowed(scored.scores, fits)
    if not scored.by_cost:
        return tuple(int(one) for one in scores.argmax(axis=1))
    forced = (scores >= FORCED).any(axis=1)
    must = scores.argmax(axis=1)
    if forced.all():
        return tuple(int(one) for one in must)
    free = ~forced
    own, times = _worth(scores[free], fits[free]), np.where(fits[free], seconds[free], np.inf)
    sure = float(np.maximum(scored.expected[must[forced]], LEAST).sum())
    begun = max(seconds[forced, must[forced]], default=0.0)
    soonest = max(begun, float(times.min(axis=1).max()))
    best, chosen = -np.inf, must
    for end in np.unique(np.append(times[np.isfinite(times) & (times > soonest)], soonest)):
        picked = np.where(times <= end, own, -np.inf).argmax(axis=1)
        places = np.arange(len(picked))
        took = max(begun, float(times[places, picked].max()))
        worth = (sure + own[places, picked].sum()) / took
        if worth > best:
            best, chosen = worth, must.copy()
            chosen[free] = picked
    return tuple(int(one) for one in chosen)


def _allowed(scores: Matrix, fits: npt.NDArray[np.bool_]) -> Matrix:
    if not fits.any(axis=1).all():
        raise DroppeftError("no arm of the configurator fits the memory of every client")
    return np.where(fits, scores, -np.inf)


def _worth(scores: Matrix, fits: npt.NDArray[np.bool_]) -> Matrix:
    return np.where(fits, np.maximum(scores, LEAST), -np.inf)
