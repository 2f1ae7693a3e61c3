"""What the configurator itself takes of a run: choosing arms, learning from rewards, and
measuring these.

    python -m benchmarks.configurator_overhead.run [SETTING=VALUE ...]

A run of the built-in model and data with `budgeted_thompson`, and one with fixed rates. The seconds
of choosing arms and merging are taken round by round (table `rounds`); what measuring a reward
takes is what clients report (table `clients`, a row per local training). About 4 minutes on one
core.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.study import about, write_table, write_values
from droppeft.config import Config, as_tree, load_config, resolve
from droppeft.messages.reply import Update
from droppeft.server.prepare import prepare
from droppeft.server.rounds import run_round
from droppeft.transports.in_process import in_process

NAME = "configurator_overhead"
SETTINGS = [
    "method=droppeft",
    "threads=1",
    "rounds=12",
    "cohort_size=6",
    "training.batch_size=8",
    "configurator.reward=loss",
    *("training.precision=fp32", "training.backbone_dropout=true"),  # the defaults when it ran
]
POLICIES = ("fixed", "budgeted_thompson")


Rows = list[dict[str, Any]]


def seconds_of_run(config: Config) -> tuple[Rows, Rows]:
    """Run a configuration; return rows of the tables `rounds` and `clients`."""
    prepared = prepare(config, lambda step: None, "0")
    spent: list[float] = []
    method = replace(
        prepared.method,
        instruct=timed(prepared.method.instruct, spent),
        merge=timed(prepared.method.merge, spent),
    )
    state, rounds, clients = prepared.state, [], []
    with in_process(prepared.loaded) as transport:
        for round in range(1, config.rounds + 1):
            spent.clear()
            state, closed = run_round(
                prepared.setup, method, transport, state, round, lambda reply: None
            )
            place = {"policy": config.configurator.policy, "round": round}
            rounds.append({**place, "choose_and_merge_s": sum(spent)})
            clients += [{**place, **took} for took in trainings(closed)]
    return rounds, clients


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The same function, which appends the seconds of each call to a list."""

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        found = function(*args)
        spent.append(time.perf_counter() - start)
        return found

    return call


def trainings(closed: Any) -> Iterator[dict[str, float]]:
    """Seconds of each merged local training of a round, and of measuring its reward."""
    updates = [one for one in closed.replies if isinstance(one, Update)]
    costs = [cost for cost in closed.modelled.clients if cost]
    for update, cost in zip(updates, costs, strict=True):
        yield {
            "training_wall_s": update.cost.total_wall_s,
            "reward_wall_s": update.cost.reward_wall_s,
            "training_modelled_s": cost.total_s,
            "reward_modelled_s": cost.reward_s,
        }


def main(overrides: list[str]) -> None:
    """Measure and write."""
    rounds, clients = [], []
    for policy in POLICIES:
        chosen = [*SETTINGS, *overrides, f"configurator.policy={policy}"]
        config = resolve(load_config(None, chosen), cuda=False)
        of_rounds, of_clients = seconds_of_run(config)
        rounds += of_rounds
        clients += of_clients
        print(policy, "done", flush=True)
    content = {
        **about(NAME),
        "rounds": config.rounds,
        "cohort_size": config.cohort_size,
        "local_steps": config.training.local_steps,
        "batch_size": config.training.batch_size,
        "config": as_tree(config),
    }
    write_values(NAME, content)
    write_table(NAME, "rounds", rounds)
    write_table(NAME, "clients", clients)


if __name__ == "__main__":
    main(sys.argv[1:])
