"""Tables about the configurator: policies on real and on simulated problems, and what it takes."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.pages.markdown import markdown_table, spread
from benchmarks.pages.studies import REMOVED, Runs, outcome_of, read_compared, runs_of
from benchmarks.study import read_table, read_values
from droppeft.comparison.study_files import RunRecord, Study
from droppeft.comparison.summary import target_values, time_to_target
from droppeft.tasks.metrics import ACCURACY

JOINED = {"configurator": ("configurator_agreement",)}
"""Later comparisons whose variants join the table of a study."""

WITHOUT_REWARDS = (None, "fixed", "uniform_random")
"""Recorded policies that do not learn."""

FIXED = (
    "nothing dropped",
    "a quarter",
    "half",
    "upper half",
    "upper half, a quarter",
    "upper half, half",
)
ARMS = {
    "nothing dropped": "nothing dropped",
    "25% dropped": "a quarter",
    "50% dropped": "half",
    "nothing dropped, first 50% not trained": "upper half",
    "25% dropped, first 50% not trained": "upper half, a quarter",
    "50% dropped, first 50% not trained": "upper half, half",
}
"""Labels of the arms in the ledger, and the variants that have nothing else."""

NAMES = {
    "random": "random arms",
    "greedy": "epsilon-greedy",
    "ucb": "sliding-window UCB",
    "thompson": "budgeted Thompson",
    "thompson, as if alike": "budgeted Thompson, devices unknown",
    "thompson, by agreement": "budgeted Thompson, reward by agreement",
    "ucb, by agreement": "sliding-window UCB, reward by agreement",
}
"""Recorded names of policies, and those of the table."""

COLUMNS = (
    "variant",
    "accuracy",
    "early",
    "regret",
    "to target",
    "whole run",
    "layers run",
)

REWARD_COLUMNS = (
    *("arm", "trials", "reward", "seconds of a trial", "reward per second", "accuracy alone"),
)


def policies(study: str, variants: Sequence[str] | None = None) -> str:
    """Single arms, then policies over all of them.

    Args:
        variants: those to show, by their recorded names; all that are still offered if not given.
    """
    asked, by_variant = _read(study)
    records = [run for runs in by_variant.values() for run in runs.values()]
    targets = target_values(asked.target, records, ACCURACY)
    times = {
        variant: {
            seed: time_to_target(run, targets.get(seed), "round_modelled_s", ACCURACY)
            for seed, run in runs.items()
        }
        for variant, runs in by_variant.items()
    }
    best = _best_arm(times)
    early = min(map(_whole, records))
    lines = [
        _line(variant, by_variant, times[variant].values(), best, early)
        for variant in (variants or by_variant)
        if variant not in REMOVED
    ]
    return markdown_table(COLUMNS, lines)


def _read(study: str) -> tuple[Study, Runs]:
    """A study with its finished runs, and those that join it."""
    asked, records = read_compared(study)
    for other in JOINED.get(study, ()):
        records = [*records, *read_compared(other)[1]]
    return asked, runs_of(records)


def rewards(study: str, reward: str) -> str:
    """What all policies that learn from this kind of reward saw of each arm, together."""
    _, by_variant = _read(study)
    learning = {
        variant: runs
        for variant, runs in by_variant.items()
        if any(_reward(run) == reward for run in runs.values())
    }
    return _rewards(learning, by_variant)


def _reward(run: RunRecord) -> str | None:
    """The kind of its rewards, if it learns; runs without that setting have rewards by the loss."""
    known = outcome_of(run)
    return None if known["policy"] in WITHOUT_REWARDS else (known["reward"] or "loss")


def _best_arm(times: Mapping[str, Mapping[int, float | None]]) -> str:
    """Of the single arms that get there on every seed, the one that is there first on average."""
    sure = {
        variant: fmean(time for time in found.values() if time is not None)
        for variant, found in times.items()
        if variant in FIXED and None not in found.values()
    }
    return min(sure, key=lambda variant: sure[variant])


def _line(
    variant: str,
    by_variant: Runs,
    times: Collection[float | None],
    best: str,
    early: float,
) -> tuple[str, ...]:
    runs, of_best = by_variant[variant], by_variant[best]
    results = [outcome_of(run) for run in runs.values()]
    there = [time for time in times if time is not None]
    lost = [_at(of_best[seed], early) - _at(run, early) for seed, run in runs.items()]
    return (
        NAMES.get(variant, variant),
        spread([result["global_accuracy"] for result in results]),
        spread([_at(run, early) for run in runs.values()]),
        "–" if variant == best else _regret(lost),
        f"{fmean(there):.2f} s" if len(there) == len(times) else f"{len(there)} of {len(times)}",
        f"{fmean(_whole(run) for run in runs.values()):.2f} s",
        f"{fmean(result['mean_active_layers'] for result in results):.2f}",
    )


def _regret(points: Sequence[float]) -> str:
    """Mean in points, with a 95 % interval over seeds."""
    mean, count = 100 * fmean(points), len(points)
    half = 100 * float(student.ppf(0.975, count - 1)) * stdev(points) / count**0.5
    return f"{mean:.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def _whole(run: RunRecord) -> float:
    return float(sum(row["round_modelled_s"] for row in run.rows))


def _at(run: RunRecord, seconds: float) -> float:
    """Mean of the last three evaluations by then."""
    clock, found = 0.0, []
    for row in run.rows:
        clock += row["round_modelled_s"]
        if clock <= seconds + 1e-9 and row["global_accuracy"] is not None:
            found.append(row["global_accuracy"])
    return fmean(found[-3:])


def _rewards(learning: Runs, by_variant: Runs) -> str:
    trials = [
        trial
        for variant, runs in learning.items()
        for seed, run in runs.items()
        for trial in _trials(run, f"{variant} {seed}")
    ]
    arms = [arm for arm in ARMS if any(trial.arm == arm for trial in trials)]
    rewards, errors = _adjusted(trials, arms)
    lines = []
    for arm, reward, error in zip(arms, rewards, errors, strict=True):
        seconds = fmean(trial.seconds for trial in trials if trial.arm == arm)
        alone = [outcome_of(run) for run in by_variant[ARMS[arm]].values()]
        lines.append(
            (
                ARMS[arm],
                f"{sum(trial.arm == arm for trial in trials):,}",
                f"{reward:.2f} ± {error:.2f}",
                f"{seconds:.3f}",
                f"{reward / seconds:.2f} ± {error / seconds:.2f}",
                spread([result["global_accuracy"] for result in alone]),
            )
        )
    return markdown_table(REWARD_COLUMNS, lines)


@dataclass(frozen=True)
class Seen:
    """A local training under a policy that learns: round, arm, reward, and the arm's seconds."""

    round: str
    arm: str
    reward: float
    seconds: float


def _trials(run: RunRecord, name: str) -> Iterator[Seen]:
    """Single arms and random choice measure no rewards."""
    for row in run.rows:
        notes = row["notes"] or {"chosen": {}}
        for client, number in notes["chosen"].items():
            reward, arm = notes["rewards"].get(client), notes["labels"][str(number)]
            if reward is not None and arm in ARMS and number in notes["present"]:
                took = notes["seconds"][notes["present"].index(number)]
                yield Seen(f"{name} {row['round']}", arm, reward, took)


def _adjusted(trials: Sequence[Seen], arms: Sequence[str]) -> tuple[Any, Any]:
    """Least squares of rewards on arm and round, in units of the rewards' root mean square.

    An arm's reward is the mean of all rewards plus its effect, relative to the mean effect.
    """
    rewards = np.array([trial.reward for trial in trials])
    rewards /= np.sqrt(np.mean(rewards**2))
    chosen = np.array([[trial.arm == arm for arm in arms] for trial in trials], dtype=float)
    _, rounds = np.unique([trial.round for trial in trials], return_inverse=True)
    own = np.zeros((len(trials), rounds.max() + 1))
    own[np.arange(len(trials)), rounds] = 1
    means = own / own.sum(axis=0)
    within = chosen - own @ (means.T @ chosen)
    left = rewards - own @ (means.T @ rewards)
    inverse = np.linalg.pinv(within.T @ within)
    effects = inverse @ within.T @ left
    free = len(trials) - own.shape[1] - len(arms) + 1
    variance = float(np.square(left - within @ effects).sum()) / free
    centre = np.eye(len(arms)) - chosen.mean(axis=0)
    errors = np.sqrt(np.diag(centre @ inverse @ centre.T) * variance)
    return rewards.mean() + centre @ effects, errors


def configurator_overhead() -> str:
    """What choosing, merging and measuring rewards take, beside the same run with fixed rates."""
    rounds = read_table("configurator_overhead", "rounds")
    clients = read_table("configurator_overhead", "clients")
    lines = []
    for name in dict.fromkeys(row["policy"] for row in rounds):
        of_clients = [row for row in clients if row["policy"] == name]
        slowest: dict[int, float] = {}
        for row in of_clients:
            slowest[row["round"]] = max(slowest.get(row["round"], 0), row["training_wall_s"])
        seconds = {
            row["round"]: row["choose_and_merge_s"] for row in rounds if row["policy"] == name
        }
        own = median(seconds.values())
        whole = median(spent + slowest[number] for number, spent in seconds.items())
        lines.append(
            (
                f"`{name}`",
                f"{1000 * own:.1f} ms",
                f"{own / whole:.2%}",
                *(f"{_measuring(of_clients, clock):.1%}" for clock in ("wall", "modelled")),
            )
        )
    columns = ("policy", "choosing, merging", "of a round", "measuring", "measuring, modelled")
    return markdown_table(columns, lines)


def _measuring(clients: Sequence[Mapping[str, Any]], clock: str) -> float:
    reward, training = (
        sum(row[f"{part}_{clock}_s"] for row in clients) for part in ("reward", "training")
    )
    return float(reward / training)


def simulated_policies(columns: Sequence[str]) -> str:
    """Time to the target on simulated problems, over that of the best fixed arm in hindsight.

    Args:
        columns: policies, by their recorded names.
    """
    problems = read_values("configurator_synthetic")["problems"]
    records: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in read_table("configurator_synthetic"):
        records.setdefault(row["problem"], {})[row["policy"]] = row
    rows = [
        [name, *(_time_ratio(records[name][policy]) for policy in columns)] for name in problems
    ]
    return markdown_table(("problem", *columns), rows)


def _time_ratio(row: Mapping[str, Any]) -> str:
    return f"{row['time_ratio']:.2f} ({row['time_ratio_low']:.2f} to {row['time_ratio_high']:.2f})"
