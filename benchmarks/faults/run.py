"""What a run survives: processes are killed in every phase of a round, over a SuperLink.

    OMP_NUM_THREADS=1 nice -n 10 python -m benchmarks.faults.run

Three sites with the built-in model, on a SuperLink and three SuperNodes with TLS and keys. One run
takes all kills of a process, each in a round of its own, with a quiet round after it. A process
comes to a phase of the round and is stopped there (`sitecustomize.py`). Then one process gets
SIGKILL: the run's own (ServerApp), the SuperLink, the SuperNode of a client, or the process that
holds its model. Processes of Flower that end are started again after a second, as a supervisor
does, and a run whose process was killed is submitted again. Every round must be that of the run in
one process, the adapter must have its bytes, and every client must be accepted, failed, late or
absent.

Writes `study.json` after each run; the same command goes on where it was stopped.
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.study import about, read_values, was_measured, write_values
from droppeft.config import load_config
from droppeft.report.screen import Quiet
from droppeft.runs.read_ledger import read_rows
from droppeft.server.run import start_run

NAME = "faults"
FOLDER = Path(__file__).resolve().parent
EXAMPLES = FOLDER.parents[1] / "examples"
TARGETS = ("run", "SuperLink", "SuperNode", "client process")
PHASES = ("send", "train", "upload", "merge", "save")
ROUNDS, CLIENTS = 2 * len(PHASES) + 1, 3
LONGEST_S = 600.0
SETTINGS = (
    "method=droppeft",
    f"cohort_size={CLIENTS}",
    f"rounds={ROUNDS}",
    "training.local_steps=2",
    "training.batch_size=4",
    *("training.precision=fp32", "training.backbone_dropout=true"),  # the defaults when it ran
    "threads=1",
    "accelerator=cpu",
    "evaluation.personalised=false",
    "evaluation.validation_clients=0",
)
ON_FLOWER = "flower.nodes_timeout_s=300"

sys.path.insert(0, str(EXAMPLES))
from flower_on_loopback import Federation, loopback  # noqa: E402


def main(repeats: int) -> None:
    """Kill every target in every phase, as often as told."""
    known = read_values(NAME) if was_measured(NAME) else {**about(NAME), "kills": []}
    done = {(kill["repeat"], kill["target"]) for kill in known["kills"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sites, settings = make_sites(folder)
        expected = folder / "expected"
        in_process(expected, sites, settings)
        for repeat, target in itertools.product(range(repeats), TARGETS):
            if (repeat, target) in done:
                continue
            name = f"{repeat}-{target.replace(' ', '-')}"
            with trapped_federation(folder / f"flower-{name}", sites) as federation:
                run = Run(federation, [*settings, ON_FLOWER], folder / f"run-{name}")
                kills = [{"repeat": repeat, **run.kill(target, phase)} for phase in PHASES]
                run.finish()
            known["kills"] += compared(run.out, expected, kills)
            write_values(NAME, known)


def compared(out: Path, expected: Path, kills: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the round of each kill, and the adapter, with those of the run without kills."""
    same_adapter = adapter_of(out) == adapter_of(expected)
    rows, wanted = (read_rows(folder / "rounds.jsonl") for folder in (out, expected))
    found = []
    for kill in kills:
        row, other = rows[kill["round"] - 1], wanted[kill["round"] - 1]
        same = all(row[key] == other[key] for key in ("accepted", "train_loss", "global_loss"))
        failures = [one["reason"] for one in row["failures"]]
        result = {"same_round": same, "unaccounted": unaccounted(row), "failures": failures}
        found.append({**kill, **result, "same_adapter": same_adapter})
    return found


def make_sites(folder: Path) -> tuple[list[Path], list[str]]:
    """Write three sites from the example; return their node files, and the settings of a run."""
    nodes = []
    for client, name in enumerate(("north", "south", "south")):
        site = shutil.copytree(EXAMPLES / "sites" / name, folder / "sites" / f"client-{client}")
        nodes.append(site / "node.toml")
        text = nodes[-1].read_text(encoding="utf-8")
        nodes[-1].write_text(re.sub(r"client = \d", f"client = {client}", text), encoding="utf-8")
    return nodes, [f"data={EXAMPLES / 'sites' / 'server'}", *SETTINGS]


def in_process(out: Path, sites: Sequence[Path], settings: Sequence[str]) -> None:
    """Run in one process, without a kill."""
    names = f"sites={','.join(map(str, sites))}"
    start_run(load_config(None, [names, *settings]), out, Quiet())


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


class Run:
    """A run over a federation, which is submitted again when its process is gone.

    Attributes:
        federation: that runs it.
        settings: of the run.
        out: its folder.
        command: shows its log.
        submissions: how often it was submitted.
    """

    def __init__(self, federation: Federation, settings: Sequence[str], out: Path) -> None:
        """Submit the run, and wait for its first round."""
        self.federation, self.settings, self.out = federation, settings, out
        self.command = federation.submit(settings, out)
        self.submissions = 1
        self.wait(lambda: self.saved() >= 1)

    def saved(self) -> int:
        """The newest round that is saved."""
        names = [path.stem for path in (self.out / "checkpoints").glob("*.safetensors")]
        return max((int(re.sub(r"\D", "", name)) for name in names), default=0)

    def kill(self, target: str, phase: str) -> dict[str, Any]:
        """Kill a process in a phase, and wait for the end of the round and of the next one."""
        traps = self.federation.folder / "traps"
        for left in traps.iterdir():
            left.unlink()
        (traps / phase).touch()
        self.wait((traps / "pid").exists)
        round, start, before = self.saved() + 1, time.monotonic(), self.submissions
        time.sleep(0.1)
        client = client_of(self.federation, int((traps / "pid").read_text()))
        os.kill(victim(self.federation, target, client), signal.SIGKILL)
        (traps / "sprung").unlink(missing_ok=True)
        if target == "run":
            self.submit_again()
        self.wait(lambda: self.saved() >= round)
        kill = {
            "target": target,
            "phase": phase,
            "round": round,
            "seconds": int(10 * (time.monotonic() - start)) / 10,
            "submissions": self.submissions - before,
        }
        print(kill, flush=True)
        self.wait(lambda: self.saved() >= round + 1)
        return kill

    def finish(self) -> None:
        """Wait for the result."""
        self.wait((self.out / "result.json").exists)
        self.command.kill()

    def submit_again(self) -> None:
        """Submit the run again, which resumes it."""
        self.command.kill()
        self.command.wait()
        self.command = self.federation.submit(self.settings, self.out)
        self.submissions += 1

    def wait(self, holds: Callable[[], bool]) -> None:
        """Wait until a function returns true; submit the run again when its process is gone.

        Raises:
            TimeoutError: it takes longer than :data:`LONGEST_S`.
        """
        end, seen = time.monotonic() + LONGEST_S, time.monotonic()
        while not holds():
            if processes_of(self.federation, "flwr-serverapp"):
                seen = time.monotonic()
            elif time.monotonic() - seen > 60.0:
                self.submit_again()
                seen = time.monotonic()
            if time.monotonic() > end:
                raise TimeoutError(f"{self.out} does not go on")
            time.sleep(0.05)


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args().repeats)
