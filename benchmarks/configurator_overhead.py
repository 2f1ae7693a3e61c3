"""What the configurator itself takes of a run: choosing arms, learning from gains, measuring gains.

    python benchmarks/configurator_overhead.py [SETTING=VALUE ...]

A run of the built-in model and data with `budgeted_thompson`, and one with fixed rates. The seconds
of planning and merging are taken round by round; measuring a gain is what devices report. Goes to
`benchmarks/results/configurator_overhead.json`. About 4 minutes on one core.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from droppeft.config import as_tree, load_config, resolve
from droppeft.federation.environment import machine, versions
from droppeft.federation.prepare import prepare
from droppeft.federation.rounds import play_round
from droppeft.plans import Update
from droppeft.transports.in_process import in_process

RESULT = Path(__file__).resolve().parent / "results/configurator_overhead.json"
SETTINGS = [
    "threads=1",
    "rounds=12",
    "cohort=6",
    "training.batch_size=8",
    "configurator.reward=loss",
]
POLICIES = ("fixed", "budgeted_thompson")


def played(words: list[str]) -> dict[str, Any]:
    """A run's rounds: the server's seconds, and each merged turn's."""
    config = resolve(load_config(None, words), cuda=False)
    prepared = prepare(config, lambda step: None, "0")
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            found = function(*args)
            spent.append(time.perf_counter() - start)
            return found

        return call

    real = prepared.method
    method = replace(real, plan=timed(real.plan), merge=timed(real.merge))
    state, rounds = prepared.state, []
    with in_process(prepared.loaded) as transport:
        for round in range(1, config.rounds + 1):
            spent.clear()
            state, closed = play_round(
                prepared.setup, method, transport, state, round, lambda reply: None
            )
            updates = [one for one in closed.replies if isinstance(one, Update)]
            turns = [turn for turn in closed.modelled.turns if turn]
            rounds.append(
                {
                    "plan_and_merge_s": sum(spent),
                    "turn_wall_s": [one.cost.turn_wall_s for one in updates],
                    "reward_wall_s": [one.cost.reward_wall_s for one in updates],
                    "turn_modelled_s": [turn.turn_s for turn in turns],
                    "reward_modelled_s": [turn.reward_s for turn in turns],
                }
            )
    return {"config": as_tree(config), "rounds": rounds}


def main(words: list[str]) -> None:
    """Measure and write."""
    found = {}
    for policy in POLICIES:
        found[policy] = played([*SETTINGS, *words, f"configurator.policy={policy}"])
        print(policy, "done", flush=True)
    content = {
        "schema_version": 1,
        "command": " ".join(["python benchmarks/configurator_overhead.py", *words]),
        "versions": versions(),
        "machine": machine("cpu"),
        "runs": found,
    }
    RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
