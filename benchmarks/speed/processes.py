"""Run a command as a user does, and measure it with all processes that it starts.

Memory is the proportional set size of Linux: a page that several processes share counts once. So
forked workers are not charged for weights that they share, and neither are Ray's processes for
their libraries.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

SAMPLE_EVERY_S = 0.5

EVERY_CORE: dict[str, str | None] = {"OMP_NUM_THREADS": None}
"""Takes away the limit of threads that the script itself has."""


class Finished(NamedTuple):
    """What a command took.

    Attributes:
        wall_s: seconds on the clock.
        cpu_s: processor seconds of all its processes.
        peak_bytes: largest sampled memory of all its processes together.
        output: what it printed.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    output: str


def run_command(
    words: Sequence[str],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str | None] | None = None,
) -> Finished:
    """Run a command to its end.

    Args:
        words: the command.
        folder: in which it runs.
        environment: variables that it gets, or with `None` does not get, beside those of this one.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    variables = {**os.environ, **(environment or {})}
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            words,
            cwd=folder,
            env={name: value for name, value in variables.items() if value is not None},
            stdout=output,
            stderr=output,
        )
        sampled = _Samples(process.pid)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        sampled.stop()
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{shlex.join(words)} failed with {process.returncode}:\n{text[-2000:]}")
    # What the command waited for is known exactly. Ray's processes are not waited for.
    cpu_s = max(used.ru_utime + used.ru_stime, sampled.cpu_s)
    return Finished(wall_s, cpu_s, sampled.peak_bytes, text)


def droppeft(*words: str) -> tuple[str, ...]:
    """The command `droppeft`, of this environment."""
    return sys.executable, "-m", "droppeft", *words


def run_droppeft(words: Sequence[str], out: Path) -> Finished:
    """`droppeft run` into a folder, as many clients at a time and as many threads as it chooses."""
    return run_command(droppeft("run", *words, "--out", str(out)), environment=EVERY_CORE)


def rows_of(out: Path, table: str) -> list[dict[str, Any]]:
    """The rows of `rounds` or `clients` of a run."""
    lines = (out / f"{table}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    words = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(words) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class _Samples:
    """Samples memory and processor time of a process and its descendants until it is stopped."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._root, self._cpu_s = psutil.Process(pid), dict[int, float]()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    @property
    def cpu_s(self) -> float:
        """Processor seconds of all processes that were seen, up to the last time."""
        return sum(self._cpu_s.values())

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_EVERY_S):
            with suppress(psutil.Error):
                family = [self._root, *self._root.children(recursive=True)]
                self.peak_bytes = max(self.peak_bytes, sum(map(self._look_at, family)))

    def _look_at(self, process: psutil.Process) -> int:
        """Note the processor time of a process; return its memory."""
        try:
            times = process.cpu_times()
            self._cpu_s[process.pid] = times.user + times.system
            return int(process.memory_full_info().pss)
        except psutil.Error:
            return 0
