"""Run a configuration on a SuperLink and three SuperNodes, all started here on loopback.

    python examples/flower_on_loopback.py runs/loopback rounds=3 clients=3 cohort_size=3

The same commands are used on four machines; see docs/tutorials/your_own_machines.md.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from droppeft.report import show_keys
from droppeft.transports.flower.keys import make_federation

APP = Path(__file__).parent / "flower_app"
NODES = 3

Submit = Callable[[Sequence[str], Path], None]
"""Runs droppeft with settings such as ``rounds=3`` in a given folder."""


@contextmanager
def loopback(folder: Path, nodes: int = NODES) -> Iterator[Submit]:
    """Start a SuperLink and SuperNodes; ``folder`` gets keys, logs and Flower's state."""
    port, *node_ports = free_ports(1 + nodes)
    keys = folder / "keys"
    make_federation(keys, ["127.0.0.1"], nodes)
    server = keys / "server"
    (folder / "config.toml").write_text(show_keys.flower_connection(server, port))
    with ExitStack() as stack:

        def start(name: str, command: str, directory: Path) -> None:
            log = stack.enter_context((folder / f"{name}.log").open("ab"))
            process = subprocess.Popen(
                words(command),
                stdout=log,
                stderr=log,
                cwd=directory,
                env=environment(folder),
                start_new_session=True,
            )
            stack.callback(stop, process)

        start("superlink", show_keys.superlink_command(server, "127.0.0.1", port), server)
        wait_for(port)
        start("superexec", show_keys.superexec_command(server, port), server)
        for client, node_port in enumerate(node_ports):
            register = show_keys.register_command(server, client)
            subprocess.run(words(register), env=environment(folder), check=True)
            command = show_keys.node_command("127.0.0.1", client, port)
            start(f"client-{client}", f"{command} --port {node_port}", keys / f"client-{client}")
        yield lambda settings, out: submit(folder, settings, out)


def words(command: str) -> list[str]:
    """Split a command as a shell does."""
    return shlex.split(command.replace("\\\n", ""))


def submit(folder: Path, settings: Sequence[str], out: Path, timeout_s: float = 3600.0) -> None:
    """Submit the app to the SuperLink and follow its log until it ends."""
    run_config = {"settings": shlex.join(settings), "out": str(out.resolve())}
    overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in run_config.items())
    command = ["flwr", "run", str(APP), "federation", "--stream", "--run-config", overrides]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=environment(folder), check=True, timeout=timeout_s)
    if not (out / "result.json").exists():
        logs = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in folder.glob("*.log")]
        raise SystemExit("\n\n".join(["the run did not finish", *logs]))


def environment(folder: Path) -> dict[str, str]:
    """Put Flower's commands on the path and its files in ``folder``; switch telemetry off."""
    commands = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def free_ports(count: int) -> list[int]:
    """Find ports that are free at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(port: int, timeout_s: float = 60.0) -> None:
    """Wait until a process listens on a port."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process; kill it if it does not end, and all that it started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(out: Path, settings: Sequence[str]) -> None:
    """Run once, and print the accuracy and the hash of the adapter."""
    with tempfile.TemporaryDirectory() as folder, loopback(Path(folder)) as run:
        run(settings, out)
    result = json.loads((out / "result.json").read_text())
    print(f"accuracy {result['global_accuracy']:.4f}, adapter {result['adapter_sha256'][:16]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
