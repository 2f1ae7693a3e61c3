"""What a run survives: processes are killed in every phase of a round, over a SuperLink.

    OMP_NUM_THREADS=1 nice -n 10 python -m benchmarks.faults.run

Three sites with the built-in model, on a SuperLink and three SuperNodes with TLS and keys. In round
2 of 3 a process comes to a phase and is stopped there (`sitecustomize.py`). Then one process
gets SIGKILL: the run's own (ServerApp), the SuperLink, the SuperNode of a client, or the process
that holds its model. Processes of Flower that end are started again after a second, as a supervisor
does, and a run whose process was killed is submitted again. The result must have the bytes of the
run in one process, and every client of every round must be accepted, failed, late or absent.

Writes `study.json` after each kill; the same command goes on where it was stopped.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.study import about, read_values, was_measured, write_values
from droppeft.config import load_config
from droppeft.report.screen import Quiet
from droppeft.runs.ledger import read_rows
from droppeft.server.run import start_run

NAME = "faults"
FOLDER = Path(__file__).resolve().parent
EXAMPLES = FOLDER.parents[1] / "examples"
TARGETS = ("run", "SuperLink", "SuperNode", "client process")
PHASES = ("send", "train", "upload", "merge", "save")
ROUNDS, KILL_IN, CLIENTS = 3, 2, 3
LONGEST_S = 400.0
SETTINGS = (
    "method=droppeft",
    f"cohort_size={CLIENTS}",
    f"rounds={ROUNDS}",
    "training.local_steps=2",
    "training.batch_size=4",
    "threads=1",
    "accelerator=cpu",
    "evaluation.personalised=false",
    "evaluation.validation_clients=0",
)
ON_FLOWER = "flower.nodes_timeout_s=300"

sys.path.insert(0, str(EXAMPLES))
from flower_on_loopback import Federation, loopback  # noqa: E402


def main(repeats: int, most_minutes: float) -> None:
    """Kill every target in every phase, as often as told or until the time is up."""
    known = read_values(NAME) if was_measured(NAME) else {**about(NAME), "kills": []}
    done = {(kill["target"], kill["phase"], kill["repeat"]) for kill in known["kills"]}
    end = time.monotonic() + 60 * most_minutes
    cells = [(target, phase, n) for n in range(repeats) for target in TARGETS for phase in PHASES]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sites, settings = make_sites(folder)
        expected = in_process(folder / "expected", sites, settings)
        with trapped_federation(folder / "flower", sites) as federation:
            for cell in cells:
                if cell in done or time.monotonic() > end:
                    continue
                kill = one_kill(federation, settings, folder, *cell)
                kill["same_bytes"] = adapter_of(folder / out_name(*cell)) == expected
                known["kills"].append(kill)
                write_values(NAME, known)
                print(kill, flush=True)


def make_sites(folder: Path) -> tuple[list[Path], list[str]]:
    """Write three sites from the example; return their node files, and the settings of a run."""
    nodes = []
    for client, name in enumerate(("north", "south", "south")):
        site = shutil.copytree(EXAMPLES / "sites" / name, folder / "sites" / f"client-{client}")
        nodes.append(site / "node.toml")
        text = nodes[-1].read_text(encoding="utf-8")
        nodes[-1].write_text(re.sub(r"client = \d", f"client = {client}", text), encoding="utf-8")
    return nodes, [f"data={EXAMPLES / 'sites' / 'server'}", *SETTINGS]


def in_process(out: Path, sites: Sequence[Path], settings: Sequence[str]) -> dict[str, bytes]:
    """Run in one process, without a kill; return the files of the adapter."""
    names = f"sites={','.join(map(str, sites))}"
    start_run(load_config(None, [names, *settings]), out, Quiet())
    return adapter_of(out)


def adapter_of(out: Path) -> dict[str, bytes]:
    """The files of a run's adapter, by name; empty if the run has not finished."""
    return {path.name: path.read_bytes() for path in sorted((out / "adapter").glob("*"))}


@contextmanager
def trapped_federation(folder: Path, sites: Sequence[Path]) -> Iterator[Federation]:
    """Start a federation in whose processes traps can be armed, and restart those that end."""
    (folder / "traps").mkdir(parents=True)
    os.environ["DROPPEFT_TRAP"] = str(folder / "traps")
    os.environ["DROPPEFT_STATE"] = str(folder / "state")
    paths = [str(FOLDER), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    with loopback(folder, sites) as federation:
        stopping = threading.Event()
        supervisor = threading.Thread(target=supervise, args=(federation, stopping), daemon=True)
        supervisor.start()
        try:
            yield federation
        finally:
            stopping.set()
            supervisor.join()


def supervise(federation: Federation, stopping: threading.Event) -> None:
    """Start processes of Flower again that have ended."""
    while not stopping.wait(1.0):
        for name, process in list(federation.processes.items()):
            if process.poll() is not None and not stopping.is_set():
                with suppress(OSError):
                    federation.start(name)


def one_kill(
    federation: Federation,
    settings: Sequence[str],
    folder: Path,
    target: str,
    phase: str,
    repeat: int,
) -> dict[str, Any]:
    """Run once, kill once, and say what became of it."""
    out, traps = folder / out_name(target, phase, repeat), federation.folder / "traps"
    for left in traps.iterdir():
        left.unlink()
    start = time.monotonic()
    command = federation.submit([*settings, ON_FLOWER], out)
    wait_until(lambda: bool(list((out / "checkpoints").glob("*1.safetensors"))))
    (traps / phase).touch()
    wait_until((traps / "pid").exists)
    time.sleep(0.1)
    client = client_of(federation, int((traps / "pid").read_text()))
    os.kill(victim(federation, target, client), signal.SIGKILL)
    killed = time.monotonic()
    (traps / "sprung").unlink(missing_ok=True)
    submissions, without = 1, 0.0
    while not (out / "result.json").exists() and time.monotonic() - killed < LONGEST_S:
        time.sleep(0.5)
        without = 0.0 if processes_of(federation, "flwr-serverapp") else without + 0.5
        if without > (2.0 if target == "run" else 20.0):
            command.kill()
            command.wait()
            command, submissions, without = (
                federation.submit([*settings, ON_FLOWER], out),
                submissions + 1,
                -20.0,
            )
    command.kill()
    command.wait()
    rows = read_rows(out / "rounds.jsonl")
    return {
        "target": target,
        "phase": phase,
        "repeat": repeat,
        "finished": (out / "result.json").exists(),
        "submissions": submissions,
        "before_s": round(killed - start, 1),
        "after_s": round(time.monotonic() - killed, 1),
        "unaccounted": sum(map(unaccounted, rows)),
        "failures": [one["reason"] for row in rows for one in row["failures"]],
    }


def unaccounted(row: Mapping[str, Any]) -> int:
    """How many clients of a round are neither accepted, failed, late nor absent."""
    failed = {one["client"] for one in row["failures"]} | {*row["late"], *row["absent"]}
    return len(row["cohort"]) - row["accepted"] - len(failed & {*row["cohort"]})


def victim(federation: Federation, target: str, client: int) -> int:
    """The process to kill."""
    if target == "run":
        return processes_of(federation, "flwr-serverapp")[0].pid
    if target == "SuperLink":
        return federation.processes["superlink"].pid
    if target == "SuperNode":
        return federation.processes[f"client-{client}"].pid
    servers = [one for one in model_servers() if client_of(federation, one.pid) == client]
    return servers[0].pid


def client_of(federation: Federation, pid: int) -> int:
    """The client to whose node a process belongs; 0 for a process of the server."""
    for client in range(CLIENTS):
        node = federation.processes[f"client-{client}"].pid
        with suppress(psutil.Error):
            ids = {node, *(child.pid for child in psutil.Process(node).children(recursive=True))}
            words = psutil.Process(pid).cmdline()
            watched = int(words[-1]) if words and words[-1].isdecimal() else pid
            if {pid, watched} & ids:
                return client
    return 0


def model_servers() -> list[psutil.Process]:
    """The processes that hold a model for a node."""
    return [one for one in psutil.process_iter() if "model_server" in command_of(one)]


def processes_of(federation: Federation, name: str) -> list[psutil.Process]:
    """The server's processes of a name."""
    with suppress(psutil.Error):
        every = psutil.Process(federation.processes["superexec"].pid).children(recursive=True)
        return [one for one in every if name in command_of(one)]
    return []


def command_of(process: psutil.Process) -> str:
    """The command line of a process; empty if it has ended."""
    with suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            return " ".join(process.cmdline())
    return ""


def out_name(target: str, phase: str, repeat: int) -> str:
    """Name of the folder of a run."""
    return f"{target.replace(' ', '-')}-{phase}-{repeat}"


def wait_until(holds: Any, most_s: float = 300.0) -> None:
    """Wait until a function returns true."""
    end = time.monotonic() + most_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(str(holds))
        time.sleep(0.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=40.0, help="start no kill after this time")
    given = parser.parse_args()
    main(given.repeats, given.minutes)
