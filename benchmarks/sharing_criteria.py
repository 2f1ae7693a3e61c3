"""What scoring layers for personalised sharing costs a device, by criterion.

    python benchmarks/sharing_criteria.py [SETTING=VALUE ...]

Whole turns of the built-in model on the built-in data, without a rule and with each criterion,
taking turns in random order. Goes to `benchmarks/results/sharing_criteria.json`: CPU and wall
seconds of every turn, forwards, and the bytes that a criterion collects besides. 12 minutes on one
core.
"""

import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from droppeft.client.loading import clients_of
from droppeft.config import as_tree, load_config, resolve
from droppeft.federation.environment import machine, versions
from droppeft.federation.prepare import prepare
from droppeft.plans import Plan, SharingRule, Update, payload_bytes
from droppeft.sharing.criteria import CRITERIA

RESULT = Path(__file__).resolve().parent / "results/sharing_criteria.json"
REPEATS, WARM_UP = 20, 2
SETTINGS = ["threads=1", "devices=4", "cohort=2", "dropout.mean=0", "training.max_length=64"]
"""Ten steps of 16 texts at full depth."""


def main(words: list[str]) -> None:
    """Measure and write."""
    config = resolve(load_config(None, [*SETTINGS, *words]), cuda=False)
    prepared = prepare(config, lambda step: None, "0")
    clients = clients_of(prepared.loaded)
    [plain] = prepared.method.plan(prepared.setup, prepared.state, 1, [1])
    rows = config.sharing.score_rows
    plans: dict[str, Plan] = {"": plain} | {
        name: replace(plain, sharing=SharingRule(name, 0.5, 0.0, rows, None)) for name in CRITERIA
    }
    found: dict[str, dict[str, Any]] = {
        name: {"cpu_s": [], "wall_s": [], "scoring_tokens": 0} for name in plans
    }
    order = random.Random(0)
    for repeat in range(WARM_UP + REPEATS):
        for name in order.sample(list(plans), len(plans)):
            wall, cpu = time.perf_counter(), time.process_time()
            reply = clients[1].run(plans[name])
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            assert isinstance(reply, Update)
            if repeat >= WARM_UP:
                found[name]["cpu_s"].append(cpu)
                found[name]["wall_s"].append(wall)
                found[name]["scoring_tokens"] = reply.cost.scoring_tokens
                found[name]["tokens"] = reply.cost.tokens
        print(f"{repeat + 1 - WARM_UP}/{REPEATS}", flush=True)
    content = {
        "schema_version": 1,
        "command": " ".join(["python benchmarks/sharing_criteria.py", *words]),
        "config": as_tree(config),
        "versions": versions(),
        "machine": machine("cpu"),
        "repeats": REPEATS,
        "score_rows": rows,
        "num_layers": prepared.setup.num_layers,
        "adapter_bytes": payload_bytes(
            {key: named for key, named in plain.tensors.items() if isinstance(key, int)}
        ),
        "turns": found,
    }
    RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
