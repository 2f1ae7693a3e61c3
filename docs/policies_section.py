"""The part of the results about the configurator's policies on real data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from scipy import stats
from studies import outcome_of, runs_of, shown_settings, spread
from tables import markdown_table, processor, read_compared, read_table, read_values, was_compared

from droppeft.bandit.policies import POLICIES, RANDOM
from droppeft.comparison.study_files import RunRecord
from droppeft.comparison.summary import target_accuracies, time_to_target

STUDIES = {
    "configurator": ("the built-in model (6 layers)", ("configurator_agreement",)),
    "configurator_deep": ("`deep12` (12 layers)", ()),
}
"""Title, and later comparisons whose variants join the table."""
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

HEAD = """\
## Policies on real data: {model}

`droppeft compare benchmarks/{name}/study.toml`: 20 Newsgroups (development data), {clients} clients
of three kinds, {cohort} a round, {rounds} rounds of {steps} steps of {batch} texts, Dirichlet alpha
{alpha:g}; {seeds}. All times are modelled and include exploring and measuring. Variants above the
line are single arms, below it are policies over all six. The target is what full depth ends with
on the same seed (mean of three evaluations) less a point; a run that never gets there in its
rounds has no time. *Early*: accuracy (mean of the last three evaluations) at {early:.2f} modelled
seconds, when the shortest run has ended; *regret*: how many points that is below the best single
arm in hindsight on the same seed, with a 95 % interval over seeds (Student's t). *Over the best
arm*: per seed, time to target over that of this arm. `droppeft report benchmarks/{name}` draws
all of it.
"""
COLUMNS = (
    "variant",
    "accuracy",
    "early",
    "regret",
    "to target",
    "over the best arm",
    "whole run",
    "idle",
    "layers run",
)
REWARD_HEAD = """\

### What the policies saw

All local trainings of the policies that learn, together: the reward of an arm by least squares on
arms and rounds, in units of the root mean square of all rewards, ± one standard error; and the
accuracy of the arm when it is used alone.
"""
REWARDS = {
    "loss": "Rewards by the loss on a client's own validation rows:\n",
    "agreement": "Rewards by agreement with the round's other clients:\n",
}
REWARD_COLUMNS = (
    "arm",
    "trials",
    "reward",
    "seconds of a trial",
    "reward per second",
    "accuracy alone",
)


OVERHEAD_HEAD = """\
## What the configurator itself takes

`benchmarks/configurator_overhead`: {rounds} rounds of {cohort} clients, {steps} steps of {batch}
texts each, on {place}; the same run with fixed rates beside it. Instructing and merging are the
server's seconds of a round (median); measuring is what clients spend on a reward by `loss`, of all
their time (by `agreement` it is nothing).
"""
OVERHEAD_COLUMNS = ("run", "instructing, merging", "of a round", "measuring", "measuring, modelled")


def policies_sections() -> list[str]:
    """A section per study that was made."""
    return [*(_section(name) for name in STUDIES if was_compared(name)), _overhead()]


def _overhead() -> str:
    content = read_values("configurator_overhead")
    head = OVERHEAD_HEAD.format(
        rounds=content["rounds"],
        cohort=content["cohort_size"],
        steps=content["local_steps"],
        batch=content["batch_size"],
        place=processor(content["machine"]),
    )
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
    return f"{head}\n{markdown_table(OVERHEAD_COLUMNS, lines)}"


def _measuring(clients: Sequence[Mapping[str, Any]], clock: str) -> float:
    reward, training = (
        sum(row[f"{part}_{clock}_s"] for row in clients) for part in ("reward", "training")
    )
    return float(reward / training)


def _section(name: str) -> str:
    title, others = STUDIES[name]
    study, records = read_compared(name)
    for other in others:
        if was_compared(other):
            records += read_compared(other)[1]
    records = [one for one in records if one.result is not None]
    targets = target_accuracies(study.target, records)
    by_variant = runs_of(records)
    times = {
        variant: {
            seed: time_to_target(run, targets.get(seed), "round_modelled_s")
            for seed, run in runs.items()
        }
        for variant, runs in by_variant.items()
    }
    best = _best_arm(times)
    early = min(_whole(run) for run in records)
    lines = [
        _line(variant, runs, by_variant.get(best or "", {}), times, best, early)
        for variant, runs in by_variant.items()
    ]
    place = len([variant for variant in by_variant if variant in FIXED])
    lines.insert(place, ("–",) * len(COLUMNS))
    head = HEAD.format(model=title, name=name, early=early, **shown_settings(by_variant))
    seen = [REWARD_HEAD]
    for reward, title in REWARDS.items():
        found = {
            variant: runs
            for variant, runs in by_variant.items()
            if any(_reward(run) == reward for run in runs.values())
        }
        seen += [title, _rewards(found, by_variant)] if found else []
    return "\n".join([head, markdown_table(COLUMNS, lines), *seen])


def _reward(run: RunRecord) -> str | None:
    """The kind of its rewards, if it learns; runs without that setting have rewards by the loss."""
    known = outcome_of(run)
    return (known["reward"] or "loss") if known["policy"] in POLICIES.keys() - {RANDOM} else None


def _best_arm(times: Mapping[str, Mapping[int, float | None]]) -> str | None:
    """Of the single arms that get there on every seed, the one that is there first on average."""
    sure = {
        variant: fmean(time for time in found.values() if time is not None)
        for variant, found in times.items()
        if variant in FIXED and found and None not in found.values()
    }
    return min(sure, key=lambda variant: sure[variant]) if sure else None


def _line(
    variant: str,
    runs: Mapping[int, RunRecord],
    of_best: Mapping[int, RunRecord],
    times_of: Mapping[str, Mapping[int, float | None]],
    best: str | None,
    early: float,
) -> tuple[str, ...]:
    times, least_of = times_of[variant], times_of.get(best or "", {})
    results = [run.result for run in runs.values() if run.result is not None]
    there = [time for time in times.values() if time is not None]
    ratios = [
        "–" if time is None else f"{time / least:.2f}"
        for seed, time in times.items()
        if (least := least_of.get(seed)) is not None
    ]
    return (
        variant,
        spread([result["global_accuracy"] for result in results]),
        spread([_at(run, early) for run in runs.values()]),
        "–"
        if variant == best
        else _regret(
            [
                _at(of_best[seed], early) - _at(run, early)
                for seed, run in runs.items()
                if seed in of_best
            ]
        ),
        f"{fmean(there):.2f} s" if len(there) == len(times) else f"{len(there)} of {len(times)}",
        ", ".join(ratios),
        f"{fmean(_whole(run) for run in runs.values()):.2f} s",
        f"{fmean(result['idle_modelled_share'] for result in results):.0%}",
        f"{fmean(result['mean_active_layers'] for result in results):.2f}",
    )


def _regret(points: Sequence[float]) -> str:
    """Mean in points, with an interval if there are seeds for one."""
    if not points:
        return "–"
    mean = 100 * fmean(points)
    if len(points) == 1:
        return f"{mean:.1f}"
    half = 100 * stats.t.ppf(0.975, len(points) - 1) * stdev(points) / len(points) ** 0.5
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


def _rewards(
    learning: Mapping[str, Mapping[int, RunRecord]],
    by_variant: Mapping[str, Mapping[int, RunRecord]],
) -> str:
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
        alone = [run.result for run in by_variant.get(ARMS[arm], {}).values() if run.result]
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
