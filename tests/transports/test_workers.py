"""Clients side by side: the same bytes with any number of workers, and what ends a run cleanly."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from chats import chat_settings
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.server.run import start_run
from droppeft.transports.forked_processes import ForkedProcesses, ProcessLost
from droppeft.transports.workers import Workers
from runs import Recorder, adapter_bytes, rows_of, timeless

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

KINDS: dict[str, list[str]] = {
    "personal layers and cached states": [
        *("frozen.layers=1", "frozen.cache=true", "sharing.fraction=0.5", "training.local_steps=3"),
        *("dropout.every=round", "cohort_size=4", "traffic.encoding=int8"),
    ],
    "ditto": ["method=ditto"],
    "base delta": ["method=fedex_lora"],
    "half precision": ["training.precision=bf16", "training.checkpointing=true"],
}


def same(out: Path) -> dict[str, Any]:
    """What must not depend on the number of workers."""
    result = timeless(json.loads((out / "result.json").read_text()))
    return {
        # A model with a base delta has no adapter of its own.
        "adapter": adapter_bytes(out) if result["adapter_sha256"] else None,
        "rounds": timeless(rows_of(out / "rounds.jsonl")),
        "clients": timeless(rows_of(out / "clients.jsonl")),
        "result": {name: value for name, value in result.items() if name != "config"},
    }


@pytest.mark.sample("personal layers*")
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_workers_changes_no_byte(
    kind: str, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations: list[int] = []
    evaluate = Workers.evaluate
    monkeypatch.setattr(
        Workers, "evaluate", lambda *given: evaluations.append(1) or evaluate(*given)
    )
    words = list(tiny_overrides)
    if any(word.startswith("method=") for word in KINDS[kind]):
        words.remove("dropout.mean=0.25")
    for workers in (1, 2, 8):
        config = load_config(None, [*words, *KINDS[kind], f"workers={workers}"])
        start_run(config, tmp_path / str(workers), Recorder())
    assert same(tmp_path / "1") == same(tmp_path / "2") == same(tmp_path / "8")
    assert evaluations


@pytest.mark.full
def test_texts_of_a_language_model_do_not_depend_on_workers(
    tmp_path: Path,
) -> None:
    words = [
        *chat_settings(tmp_path),
        "evaluation.personalised_generated=2",
        "evaluation.generated=4",
    ]
    for workers in (1, 3):
        start_run(
            load_config(None, [*words, f"workers={workers}"]), tmp_path / str(workers), Recorder()
        )
    assert same(tmp_path / "1") == same(tmp_path / "3")


@pytest.fixture
def processes() -> Iterator[Callable[..., ForkedProcesses]]:
    """Function that forks two processes which can call the functions that it is given."""
    made = []

    def make(**functions: Callable[..., Any]) -> ForkedProcesses:
        made.append(ForkedProcesses(2, functions, lambda: None))
        return made[-1]

    yield make
    for one in made:
        one.close()


def fail(error: BaseException) -> None:
    raise error


class OddError(Exception):
    """Cannot be pickled as most errors can: it is made from two values."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_what_a_call_raises_reaches_the_caller(
    processes: Callable[..., ForkedProcesses],
) -> None:
    with pytest.raises(DroppeftError, match="the disk is full") as told:
        list(processes(fail=lambda: fail(DroppeftError("the disk is full"))).run([("fail", ())]))
    assert "in fail" in told.value.__notes__[0]
    with pytest.raises(RuntimeError, match="OddError: 1 and 2"):
        list(processes(fail=lambda: fail(OddError(1, 2))).run([("fail", ())]))


def test_a_process_that_is_killed_is_no_lost_reply(
    processes: Callable[..., ForkedProcesses],
) -> None:
    def work(number: int) -> int:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    pool = processes(work=work)
    with pytest.raises(ProcessLost, match="call 2: killed by SIGKILL"):
        list(pool.run([("work", (number,)) for number in range(4)]))
    assert len(pool) == 0


def test_a_call_that_hangs_is_ended(processes: Callable[..., ForkedProcesses]) -> None:
    pool = processes(sleep=lambda: time.sleep(600))
    with pytest.raises(TimeoutError):
        list(pool.run([("sleep", ())], 0.2))
    assert len(pool) == 0


PARENT = """
import os, signal, sys, time
from droppeft.transports.forked_processes import ForkedProcesses

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
pool = ForkedProcesses(2, {"sleep": lambda: time.sleep(600)}, lambda: None)
print(*(process.pid for process in pool._processes.values()), flush=True)
list(pool.run([("sleep", ())] * 2))
"""


@pytest.mark.parametrize("by", ["SIGKILL", "SIGINT"])
def test_no_process_outlives_its_parent(by: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    parent.send_signal(getattr(signal, by))
    parent.wait(30)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert len(children) == 2
    assert not alive
    parent.stdout.close()
