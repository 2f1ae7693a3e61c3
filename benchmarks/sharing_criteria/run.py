"""What scoring layers for personalised sharing costs a client, by criterion.

    python -m benchmarks.sharing_criteria.run [SETTING=VALUE ...]

Measures whole local trainings of the built-in model on the built-in data, without a rule and with
each criterion, in random order. The table `repeats` has CPU and wall seconds of each, and the
tokens of its steps and of scoring. 12 minutes on one core.
"""

import random
import sys
import time
from dataclasses import replace

from benchmarks.study import about, write_table, write_values
from droppeft.client.run_inputs import clients_of
from droppeft.config import as_tree, load_config, resolve
from droppeft.messages.instruction import Instruction, SharingRule
from droppeft.messages.reply import Update
from droppeft.messages.tensors import payload_bytes
from droppeft.server.prepare import prepare
from droppeft.sharing.criteria import CRITERIA, SCORE_ROWS

NAME = "sharing_criteria"
REPEATS, WARM_UP = 20, 2
SETTINGS = [
    *("method=droppeft", "threads=1", "clients=4", "cohort_size=2"),
    *("dropout.mean=0", "training.max_length=64"),
    *("training.precision=fp32", "training.backbone_dropout=true"),  # the defaults when it ran
]
"""Ten steps of 16 texts at full depth."""


def main(overrides: list[str]) -> None:
    """Measure and write."""
    config = resolve(load_config(None, [*SETTINGS, *overrides]), cuda=False)
    prepared = prepare(config, lambda step: None, "0")
    clients = clients_of(prepared.loaded)
    [plain] = prepared.method.instruct(prepared.setup, prepared.state, 1, [1])
    instructions: dict[str, Instruction] = {"none": plain} | {
        name: replace(plain, sharing=SharingRule(name, 0.5, 0.0, None)) for name in CRITERIA
    }
    repeats = []
    order = random.Random(0)
    for repeat in range(WARM_UP + REPEATS):
        for name in order.sample(list(instructions), len(instructions)):
            wall, cpu = time.perf_counter(), time.process_time()
            reply = clients[1].run(instructions[name])
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            assert isinstance(reply, Update)
            if repeat >= WARM_UP:
                repeats.append(
                    {
                        "criterion": name,
                        "repeat": repeat - WARM_UP,
                        "cpu_s": cpu,
                        "wall_s": wall,
                        "tokens": reply.cost.tokens,
                        "scoring_tokens": reply.cost.scoring_tokens,
                    }
                )
        print(f"{repeat + 1 - WARM_UP}/{REPEATS}", flush=True)
    content = {
        **about(NAME),
        "local_steps": config.training.local_steps,
        "batch_size": config.training.batch_size,
        "repeats": REPEATS,
        "score_rows": SCORE_ROWS,
        "num_layers": prepared.setup.num_layers,
        "adapter_bytes": payload_bytes(
            {key: named for key, named in plain.tensors.items() if isinstance(key, int)}
        ),
        "config": as_tree(config),
    }
    write_values(NAME, content)
    write_table(
        NAME, "repeats", sorted(repeats, key=lambda row: list(instructions).index(row["criterion"]))
    )


if __name__ == "__main__":
    main(sys.argv[1:])
