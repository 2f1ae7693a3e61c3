"""Which policy wins where, on problems whose answer is known: no model, no data, many rounds.

    python -m benchmarks.configurator_synthetic.run

A run begins with a remaining loss of 1. A local training with arm a reduces it by the part
`worth(a) x rate`, which is observed with noise as the client's reward. The round reduces the loss
by the mean of its clients, and lasts as long as the slowest one. Three kinds of client, ten a
round, six arms (none, a quarter or half dropped; everything trained, or the upper half). Problems
differ in noise, in how much dropping harms, and in whether that grows as the loss falls (drift).
Time to the target counts until 5 % are left.

Policies are compared with the best fixed arm for all clients in hindsight (found by running each),
with the best arm per kind of client (of three seeds), and with the mean fixed arm. Policies that
learn pay for measuring rewards, as in a run with its defaults; fixed arms and random choice do
not. Regret is the time ratio to the best fixed arm less one; intervals are bootstrapped over the
seeds. The table `result` has a row per problem and policy. About fifteen minutes on one core.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.study import about, write_table, write_values
from droppeft.bandit import POLICIES, Arm, Observation, PolicyInputs, choose_together, score
from droppeft.bandit.bandit_memory import begin, with_round
from droppeft.bandit.learning import WINDOW
from droppeft.bandit.policies import EPSILON

NAME = "configurator_synthetic"
SEEDS, CLIENTS, MOST = 20, 10, 3000
WINDOWS = (5, 10, 40)
TARGET = 0.05
ARMS = [Arm(mean, untrained) for untrained in (0.0, 0.5) for mean in (0.0, 0.25, 0.5)]
# A step's time is forward 1 and backward 2 of every layer that runs, a twelfth for the rest.
TIMES = np.array([1.0, 0.77, 0.54, 0.69, 0.58, 0.46])
MEASURING = 2 * 16 / 3 / (10 * 16)
"""Of a full local training: forwards over 16 rows before and after its ten steps of 16."""
SPEEDS = np.array([1.0, 1.9, 2.9])
"""Of a Jetson TX2, Xavier NX and AGX Xavier, in the proportion of their fitted profiles."""


@dataclass(frozen=True)
class Problem:
    """What the policies do not know.

    Attributes:
        rate: part of the remaining loss by which a full local training reduces it.
        worth: of each arm at the start, 1 for full training.
        late: worth of each arm when no loss is left; between, it is linear in the loss.
        noise: deviation of a client's reward, in units of a full reward at the start of the round.
        floor: least deviation, in units of a full reward at the start of the run.
    """

    rate: float
    worth: tuple[float, ...]
    late: tuple[float, ...]
    noise: float
    floor: float = 0.0


HARMLESS = (1.0, 0.97, 0.9, 1.0, 0.96, 0.88)
HARMFUL = (1.0, 0.6, 0.35, 0.95, 0.55, 0.3)
PREFIX = (1.0, 0.7, 0.45, 0.55, 0.4, 0.25)
PROBLEMS: Mapping[str, Problem] = {
    "dropping is harmless": Problem(0.01, HARMLESS, HARMLESS, 0.5),
    "dropping harms": Problem(0.01, HARMFUL, HARMFUL, 0.5),
    "only full training works": Problem(0.01, PREFIX, PREFIX, 0.5),
    "harm grows as the loss falls": Problem(0.01, HARMLESS, HARMFUL, 0.5),
    "very noisy": Problem(0.01, HARMFUL, HARMFUL, 2.0),
    "noise that does not decay": Problem(0.01, HARMLESS, HARMFUL, 0.5, floor=0.25),
    "a short run": Problem(0.1, HARMLESS, HARMFUL, 0.5),
    "a short, very noisy run": Problem(0.1, HARMFUL, HARMFUL, 2.0),
}
Choice = Callable[[int, Sequence[int], np.random.Generator], tuple[int, ...]]


def worth_now(problem: Problem, left: float) -> np.ndarray:
    """Worth of each arm, when so much of the loss is left."""
    return left * np.array(problem.worth) + (1 - left) * np.array(problem.late)


def seconds_of(kinds: Sequence[int], *, measures: bool) -> np.ndarray:
    """Seconds (clients, A) of a local training, with measuring its reward if ``measures``."""
    return (TIMES[None, :] + MEASURING * measures) / SPEEDS[list(kinds)][:, None]


def typical_seconds(*, measures: bool) -> np.ndarray:
    """Seconds (A,) of a local training, mean over the kinds of client."""
    return seconds_of(range(len(SPEEDS)), measures=measures).mean(axis=0)


class Player:
    """A policy as a run uses it."""

    def __init__(self, policy: str, *, by_profile: bool = True, window: int = WINDOW) -> None:
        self.policy, self.by_profile, self.window = policy, by_profile, window
        self.measures = policy != "uniform_random"
        self.memory = begin(ARMS, 64.0)

    def choose(self, kinds: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
        """An arm for each client."""
        numbers = list(self.memory.numbers)
        seconds = seconds_of(kinds, measures=self.measures)[:, numbers]
        if not self.by_profile:
            typical = typical_seconds(measures=self.measures)[numbers]
            seconds = np.tile(typical, (len(kinds), 1))
        untried = np.array([number not in self.memory.tried for number in numbers])
        asked = PolicyInputs(seconds, seconds > 0, untried, rng)
        scored = score(self.policy, self.memory.known(self.window), asked)
        return tuple(numbers[place] for place in choose_together(scored, seconds, asked.fits))

    def learn(self, round: int, arms: Sequence[int], rewards: Sequence[float]) -> None:
        """Add the rewards of a round to what is known."""
        trials = [
            Observation(round, arm, float(reward))
            for arm, reward in zip(arms, rewards, strict=True)
        ]
        self.memory = with_round(self.memory, trials, round, None, window=self.window)


class Fixed:
    """One fixed arm for each kind of client; no reward is measured."""

    measures = False

    def __init__(self, arms: Sequence[int]) -> None:
        self.arms = arms

    def choose(self, kinds: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
        """The arm of each client's kind."""
        return tuple(self.arms[kind] for kind in kinds)

    def learn(self, round: int, arms: Sequence[int], rewards: Sequence[float]) -> None:
        """Do nothing."""


def simulate(problem: Problem, player: Player | Fixed, seed: int) -> tuple[float, float]:
    """Time to the target, and the mean share of it in which clients wait.

    Cohorts and noise are the same for every policy with one seed.
    """
    rng, own = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    left, clock, idle = 1.0, 0.0, []
    for round in range(1, MOST + 1):
        kinds = rng.integers(len(SPEEDS), size=CLIENTS).tolist()
        arms = player.choose(kinds, own)
        reward = left * problem.rate * worth_now(problem, left)[list(arms)]
        spread = problem.rate * max(problem.noise * left, problem.floor)
        player.learn(round, arms, reward + spread * rng.normal(size=CLIENTS))
        took = seconds_of(kinds, measures=player.measures)[range(CLIENTS), arms]
        clock += float(took.max())
        idle.append(1 - float(took.mean() / took.max()))
        left -= float(reward.mean())
        if left <= TARGET:
            return clock, fmean(idle)
    return float("inf"), fmean(idle)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean, from 2,000 draws."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, size=(2000, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def study(problem: Problem) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run all policies on one problem; return facts about it, and a row for each policy."""
    seeds = range(SEEDS)
    fixed = {
        arm: fmean(simulate(problem, Fixed((arm,) * 3), s)[0] for s in seeds) for arm in range(6)
    }
    best = min(fixed, key=lambda arm: fixed[arm])
    kinds = {
        arms: fmean(simulate(problem, Fixed(arms), seed)[0] for seed in range(3))
        for arms in itertools.product(range(6), repeat=3)
    }
    by_kind = min(kinds, key=lambda arms: kinds[arms])
    base = [simulate(problem, Fixed((best,) * 3), s) for s in seeds]
    rows = []
    players: dict[str, Callable[[], Player | Fixed]] = {
        "best fixed arm per kind of device": lambda: Fixed(by_kind),
        **{name: (lambda name=name: Player(name)) for name in POLICIES},
        "budgeted_thompson, as if alike": lambda: Player("budgeted_thompson", by_profile=False),
        **{
            f"budgeted_thompson, window {window}": (
                lambda window=window: Player("budgeted_thompson", window=window)
            )
            for window in WINDOWS
        },
    }
    for name, make in players.items():
        outcomes = [simulate(problem, make(), seed) for seed in seeds]
        ratios = [own[0] / other[0] for own, other in zip(outcomes, base, strict=True)]
        low, high = interval(ratios)
        rows.append(
            {
                "policy": name,
                "time_ratio": fmean(ratios),
                "time_ratio_low": low,
                "time_ratio_high": high,
                "idle_share": fmean(idle for _, idle in outcomes),
            }
        )
    known = {
        **asdict(problem),
        "best_fixed_arm": ARMS[best].label,
        "best_by_kind": [ARMS[arm].label for arm in by_kind],
        "best_fixed_idle_share": fmean(idle for _, idle in base),
        "mean_fixed_ratio": fmean(fixed.values()) / fixed[best],
        "rounds_of_best": fmean(base_time for base_time, _ in base) / TIMES[best],
    }
    return known, rows


def main() -> None:
    """Run all problems and write the results."""
    start = time.perf_counter()
    known, result = {}, []
    for name, problem in PROBLEMS.items():
        known[name], rows = study(problem)
        result += [{"problem": name, **row} for row in rows]
        print(f"{name}: best fixed {known[name]['best_fixed_arm']}")
        for row in rows:
            within = f"({row['time_ratio_low']:.3f} to {row['time_ratio_high']:.3f})"
            ratio, idle = row["time_ratio"], row["idle_share"]
            print(f"  {row['policy']:<36} {ratio:6.3f} {within}, idle {idle:.0%}")
        print(f"  {'mean fixed arm':<36} {known[name]['mean_fixed_ratio']:6.3f}", flush=True)
    settings = {
        "seeds": SEEDS,
        "clients": CLIENTS,
        "window": WINDOW,
        "measuring": MEASURING,
        "other_windows": list(WINDOWS),
        "epsilon": EPSILON,
        "target": TARGET,
        "arms": [arm.label for arm in ARMS],
        "times": TIMES.tolist(),
        "speeds": SPEEDS.tolist(),
    }
    wall_s = time.perf_counter() - start
    content = {**about(NAME), "settings": settings, "problems": known, "wall_s": wall_s}
    write_values(NAME, content)
    write_table(NAME, "result", result)


if __name__ == "__main__":
    main()
