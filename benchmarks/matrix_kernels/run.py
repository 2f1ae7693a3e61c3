"""What MKL's kernels cost on a processor that is not Intel's.

    python -m benchmarks.matrix_kernels.run    # about six minutes; needs a C compiler

MKL, with which torch multiplies matrices on x86, detects the maker of the processor and uses
generic kernels on others than Intel's. A preloaded library of one line changes what it detects:

    echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' > intel.c
    cc -shared -fPIC -o intel.so intel.c
    LD_PRELOAD=$PWD/intel.so droppeft run

Processes with and without it alternate: multiplying matrices, and steps of the built-in model, on
one thread. Writes `study.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.study import about, write_values
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config, resolve
from droppeft.server.prepare import prepare

NAME = "matrix_kernels"
SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
SHAPES = ((256, 384, 384), (256, 384, 1536), (1024, 768, 3072), (1024, 1024, 4096))
WORDS = (
    "method=fedlora",
    "threads=1",
    "training.batch_size=8",
    "training.max_length=32",
    "training.precision=fp32",
    "training.backbone_dropout=true",
)


def main() -> None:
    """Measure in child processes, alternately, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(_measure()))
        return
    with tempfile.TemporaryDirectory() as folder:
        library = _library(Path(folder))
        runs: dict[str, list[Any]] = {"as it is": [], "preloaded": []}
        for _ in range(chosen.repeats):
            for name, found in runs.items():
                found.append(_child({"LD_PRELOAD": str(library)} if name == "preloaded" else {}))
                print(name, found[-1], flush=True)
    write_values(NAME, {**about(NAME), "settings": WORDS, "shapes": SHAPES, "runs": runs})


def _library(folder: Path) -> Path:
    (folder / "intel.c").write_text(SOURCE, encoding="utf-8")
    made = folder / "intel.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, folder / "intel.c"], check=True)
    return made


def _child(more: dict[str, str]) -> Any:
    words = [sys.executable, "-m", f"benchmarks.{NAME}.run", "--child"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    return {"gflops": [_gflops(*shape) for shape in SHAPES], "training_s": _training()}


def _gflops(rows: int, inner: int, columns: int) -> float:
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - start)
    return 2e-9 * rows * inner * columns / float(np.median(times))


def _training() -> float:
    """Processor seconds of a local training of ten steps, the second of two."""
    prepared = prepare(resolve(load_config(None, WORDS), cuda=False), lambda step: None, "00c0ffee")
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    clients = clients_of(prepared.loaded)
    for _ in range(2):
        start = time.process_time()
        clients[0].run(instruction)
    return time.process_time() - start


if __name__ == "__main__":
    main()
