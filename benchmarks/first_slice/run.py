"""Two methods on AG News over 20 clients: accuracy, wall time, and the loop's overhead.

    DROPPEFT_DATA=../shared/data python -m benchmarks.first_slice.run

Runs `examples/ag_news.toml` with two methods that alternate round by round (fedlora's round 1,
droppeft's round 1, fedlora's round 2 ...), so that both run under the same load of a shared
machine. Writes the tables `result` (a row per method) and `rounds`. About 20 minutes on 2 cores.
"""

import argparse
import json
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.study import about, read_table, write_table, write_values
from droppeft.config import load_config
from droppeft.messages.reply import Reply
from droppeft.runs.ledger import RoundRow
from droppeft.runs.read_ledger import read_rows
from droppeft.server.run import start_run

NAME = "first_slice"
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/ag_news.toml"
METHODS = ("fedlora", "droppeft")
RESULT = (
    *("num_layers", "trainable_parameters", "train_rows", "test_rows", "sampled_test_rows"),
    *("data_hash", "adapter_sha256", "majority_accuracy", "tfidf_accuracy", "initial_accuracy"),
    *("global_accuracy", "global_f1", "global_loss", "best_accuracy", "best_round"),
    *("mean_active_layers", "activation_bytes_peak", "upload_bytes", "download_bytes"),
    *("prepare_wall_s", "train_wall_s", "evaluation_wall_s", "host_wall_s", "round_measured_s"),
    *("target", "target_round", "time_to_target_measured_s", "time_to_target_host_s"),
)
"""What is taken from a run's result."""
ROUND = (
    *("round", "global_accuracy", "global_f1", "global_loss", "train_loss", "mean_active_layers"),
    *("activation_bytes_peak", "upload_bytes", "download_bytes", "round_measured_s"),
    *("train_wall_s", "evaluation_wall_s", "saving_wall_s", "host_wall_s"),
)
"""What is taken from each round, besides its cohort."""


class Turns:
    """Lets one of several threads work at a time, in order; threads that are done are skipped."""

    def __init__(self, variants: int) -> None:
        self.waiting = list(range(variants))
        self._changed = threading.Condition()

    def take(self, variant: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.waiting[0] == variant)

    def give(self, variant: int, *, last: bool = False) -> None:
        with self._changed:
            self.waiting.remove(variant)
            if not last:
                self.waiting.append(variant)
            self._changed.notify_all()


class TakesTurns:
    """A listener that lets the other run continue after each round."""

    def __init__(self, turns: Turns, variant: int) -> None:
        self.turns, self.variant = turns, variant

    def preparing(self, what: str) -> None: ...

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None: ...

    def replied(self, reply: Reply) -> None: ...

    def finished(self, result: Mapping[str, Any]) -> None: ...

    def round_done(self, row: RoundRow) -> None:
        accuracy = row.quality["global_accuracy"]
        print(f"{METHODS[self.variant]:9} round {row.round:2} {accuracy:.3f}", flush=True)
        self.turns.give(self.variant)
        self.turns.take(self.variant)


def run_both(folder: Path, overrides: list[str]) -> None:
    """Run every method in its own thread and folder, one round at a time."""
    turns = Turns(len(METHODS))

    def work(variant: int) -> None:
        turns.take(variant)
        try:
            config = load_config(EXAMPLE, [f"method={METHODS[variant]}", *overrides])
            start_run(config, folder / METHODS[variant], TakesTurns(turns, variant))
        finally:
            turns.give(variant, last=True)

    threads = [threading.Thread(target=work, args=(variant,)) for variant in range(len(METHODS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def collect(folder: Path) -> None:
    """Write results and curves of all methods, and the share of time outside the actual work."""
    result, rounds = [], []
    for method in METHODS:
        found = json.loads((folder / method / "result.json").read_text(encoding="utf-8"))
        totals = {key: found[key] for key in RESULT}
        result.append({"variant": method, **totals, "overhead": overhead(found)})
        rounds += [
            {
                "variant": method,
                **{key: row[key] for key in ROUND},
                "clients": " ".join(map(str, row["cohort"])),
            }
            for row in read_rows(folder / method / "rounds.jsonl")
        ]
    config = found["config"]
    content = {
        **about(NAME),
        "clients": config["clients"],
        "cohort_size": config["cohort"],
        "rounds": config["rounds"],
        "local_steps": config["training"]["local_steps"],
        "alpha": config["partition"]["alpha"],
        "config": {**config, "data": "$DROPPEFT_DATA/ag_news"},
        "machine": found["machine"],
    }
    write_values(NAME, content)
    write_table(NAME, "result", result)
    write_table(NAME, "rounds", rounds)


def overhead(result: Mapping[str, Any]) -> float:
    """Part of the rounds' wall time that is neither training steps nor evaluation."""
    work = result["train_wall_s"] + result["evaluation_wall_s"]
    return float(1 - work / result["host_wall_s"])


def main() -> None:
    """Run both; arguments are overrides, as for ``droppeft run``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help="key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_both(Path(folder), arguments.settings)
        collect(Path(folder))
    for row in read_table(NAME):
        print(
            f"{row['variant']:9} accuracy {row['global_accuracy']:.4f}"
            f"  best {row['best_accuracy']:.3f}"
            f"  .86 after {row['time_to_target_host_s']} s  overhead {row['overhead']:.1%}"
        )


if __name__ == "__main__":
    main()
