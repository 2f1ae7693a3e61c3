"""What two options of torch bring: fp32 products in fewer bits, and threads that sleep.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.torch_options

- `torch.set_float32_matmul_precision("medium")` lets the processor multiply fp32 matrices in bf16:
  a single product, and a training of the built-in model in fp32.
- `OMP_WAIT_POLICY=passive` lets threads that wait for one another sleep instead of spin: products
  per second of a process with two threads, alone and beside three processes that keep cores busy.

Writes the table `torch_options`. About four minutes on two cores, nothing else running.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.measuring import Arm, alternate, arguments, data_file, middle, write_part
from benchmarks.speed.our_training import our_training
from benchmarks.speed.processes import busy_processes, run_command

PART = "torch_options"
SHAPE, STEPS = (1024, 576, 1536), 4
BUSY = 3
POLICIES: dict[str, dict[str, str | None]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "2 threads, OMP_WAIT_POLICY=passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
}
CHILD_S = 2.0


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    yield
    torch.set_float32_matmul_precision(before)


def product_arms() -> dict[str, Arm]:
    """A linear map in three types, and a training in two."""
    rows, inner, columns = SHAPE
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)

    def multiply(x: torch.Tensor, weight: torch.Tensor, precision: str = "highest") -> Arm:
        def run() -> None:
            with products_in(precision):
                for _ in range(100):
                    torch.nn.functional.linear(x, weight)

        return run

    words = (f"data={data_file('ag_news')}", "training.precision=fp32")
    training = our_training(words, STEPS, 16)

    def train(precision: str) -> Arm:
        def run() -> dict[str, Any]:
            with products_in(precision):
                return {"train_loss": training.train().train_loss}

        return run

    return {
        "product: fp32": multiply(x, weight),
        "product: fp32, medium": multiply(x, weight, "medium"),
        "product: bf16": multiply(x.bfloat16(), weight.bfloat16()),
        "training: fp32": train("highest"),
        "training: fp32, medium": train("medium"),
    }


def thread_arms() -> dict[str, Arm]:
    """Products per second of a process, by its threads and what else runs."""

    def run_child(policy: dict[str, str | None], busy: int) -> Arm:
        def run() -> dict[str, Any]:
            with busy_processes(busy) if busy else nullcontext():
                words = [sys.executable, "-m", f"benchmarks.speed.{PART}", "--child"]
                took = run_command(words, environment=policy, folder=Path.cwd())
            return {"iterations_per_s": float(took.output.split()[-1])}

        return run

    return {
        f"{name}, {f'beside {busy} busy processes' if busy else 'alone'}": run_child(policy, busy)
        for busy in (0, BUSY)
        for name, policy in POLICIES.items()
    }


def count_iterations() -> float:
    """Iterations per second of a few products such as a small model's."""
    x, weight = torch.randn(256, 384), torch.randn(1536, 384)
    end, count = time.perf_counter() + CHILD_S, 0
    while time.perf_counter() < end:
        torch.nn.functional.gelu(torch.nn.functional.linear(x, weight)) @ weight
        count += 1
    return count / CHILD_S


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--child", action="store_true", help="count, and print the result")
    chosen = parser.parse_args()
    if chosen.child:
        print(count_iterations())
        return
    rows = alternate(product_arms(), chosen.repeats)
    rows += alternate(thread_arms(), chosen.repeats, warm_up=False)
    for arm in dict.fromkeys(row["variant"] for row in rows):
        column = "iterations_per_s" if "thread" in arm else "wall_s"
        print(f"{arm}: {column} {middle(rows, arm, column):.3g}")
    write_part(PART, {"shape": SHAPE, "steps": STEPS, "busy": BUSY}, rows)


if __name__ == "__main__":
    main()
