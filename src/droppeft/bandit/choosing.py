"""Choose arms for a cohort so that the reward per second of the round is largest. Ours."""

import numpy as np
import numpy.typing as npt

from droppeft.bandit.learning import MIN_REWARD
from droppeft.bandit.policies import FORCED, ScoredArms
from droppeft.errors import DroppeftError

Matrix = npt.NDArray[np.float64]


def choose_together(
    scored: ScoredArms, seconds: Matrix, fits: npt.NDArray[np.bool_], least: float = 0.0
) -> tuple[int, ...]:
    """Choose an arm for each client of a cohort; the round lasts as long as its slowest client.

    For a round of T seconds, each client takes the arm with the best score among those that take at
    most T. The T with the largest sum of scores per second is used. A client with a forced arm
    takes that arm.

    Args:
        scored: scores of A arms.
        seconds: (clients, A) modelled seconds of a local training.
        fits: (clients, A) whether the client has enough memory.
        least: share of the largest possible sum of scores that a round has at least, since a run
            has a fixed number of rounds.

    Returns:
        The index of an arm for each client; the first one among equals.

    Raises:
        DroppeftError: if no arm fits some client.
    """
    scores = _allowed(scored.scores, fits)
    if not scored.by_cost:
        return tuple(int(arm) for arm in scores.argmax(axis=1))
    forced = (scores >= FORCED).any(axis=1)
    best_arm = scores.argmax(axis=1)
    if forced.all():
        return tuple(int(arm) for arm in best_arm)
    free = ~forced
    rewards, times = _floored(scores[free], fits[free]), np.where(fits[free], seconds[free], np.inf)
    forced_reward = float(np.maximum(scored.expected[best_arm[forced]], MIN_REWARD).sum())
    forced_time = max(seconds[forced, best_arm[forced]], default=0.0)
    soonest = max(forced_time, float(times.min(axis=1).max()))
    enough = least * float(rewards.max(axis=1).sum()) - 1e-9
    best, chosen = -np.inf, best_arm
    for end in np.unique(np.append(times[np.isfinite(times) & (times > soonest)], soonest)):
        picked = np.where(times <= end, rewards, -np.inf).argmax(axis=1)
        rows = np.arange(len(picked))
        if rewards[rows, picked].sum() < enough:
            continue
        duration = max(forced_time, float(times[rows, picked].max()))
        worth = (forced_reward + rewards[rows, picked].sum()) / duration
        if worth > best:
            best, chosen = worth, best_arm.copy()
            chosen[free] = picked
    return tuple(int(arm) for arm in chosen)


def _allowed(scores: Matrix, fits: npt.NDArray[np.bool_]) -> Matrix:
    if not fits.any(axis=1).all():
        raise DroppeftError(
            "no arm of the configurator fits the memory of some client; add larger values to "
            "configurator.means, or smaller ones to configurator.depths"
        )
    return np.where(fits, scores, -np.inf)


def _floored(scores: Matrix, fits: npt.NDArray[np.bool_]) -> Matrix:
    return np.where(fits, np.maximum(scores, MIN_REWARD), -np.inf)
