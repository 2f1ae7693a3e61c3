r"""Run a configuration on a SuperLink and a SuperNode for each site, all started here on loopback.

    python examples/flower_on_loopback.py examples/sites runs/loopback \
        data=examples/sites/server rounds=3

The connections are encrypted and the nodes have keys. The same commands are used on several
machines; see docs/tutorials/your_own_machines.ipynb.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from droppeft.client.node_file import read_node_file
from droppeft.report import show_keys
from droppeft.transports.flower.keys import make_federation

APP = Path(__file__).parent / "flower_app"
HERE = "127.0.0.1"
SUPERLINK, SUPEREXEC = "superlink", "superexec"


class Federation:
    """The processes of a SuperLink and its nodes; ``folder`` has keys, logs and Flower's state.

    Attributes:
        folder: of this federation.
        processes: those that run, by name: superlink, superexec, client-0 and so on.
    """

    def __init__(self, folder: Path, sites: Sequence[Path]) -> None:
        """Make keys for a node per site; ``sites`` are their node files."""
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._clients = len(sites)
        self._port, *ports = free_ports(1 + len(sites))
        keys = folder / "keys"
        make_federation(keys, [HERE], len(sites))
        self._server = keys / "server"
        connection = show_keys.flower_connection(self._server, self._port)
        (folder / "config.toml").write_text(connection)
        self._commands = {
            SUPERLINK: show_keys.superlink_command(self._server, HERE, self._port),
            SUPEREXEC: show_keys.superexec_command(self._server, self._port),
        }
        for site, port in zip(sites, ports, strict=True):
            client = read_node_file(site).client
            command = show_keys.node_command(HERE, client, self._port, str(site.absolute()))
            self._commands[f"client-{client}"] = f"{command} --port {port}"

    def start(self, name: str) -> None:
        """Start a process; its output goes to a log in the folder."""
        inside = self.folder / "keys" / name
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                words(self._commands[name]),
                stdout=log,
                stderr=log,
                cwd=inside if inside.is_dir() else None,
                env=environment(self.folder),
                start_new_session=True,
            )
        if name == SUPERLINK:
            wait_for(self._port)

    def start_all(self) -> None:
        """Start the server's processes, register the nodes' keys, and start the nodes."""
        self.start(SUPERLINK)
        self.start(SUPEREXEC)
        for client in range(self._clients):
            command = show_keys.register_command(self._server, client)
            quiet = subprocess.DEVNULL
            subprocess.run(words(command), env=environment(self.folder), check=True, stdout=quiet)
            self.start(f"client-{client}")

    def stop_all(self) -> None:
        """Stop all processes, the nodes first."""
        for process in reversed(self.processes.values()):
            stop(process)

    def submit(self, settings: Sequence[str], out: Path) -> "subprocess.Popen[bytes]":
        """Start droppeft with settings such as ``rounds=3`` in a folder; the process shows its log.

        Without settings, the run in the folder is resumed.
        """
        if settings:
            keys = self._server / "clients"
            sites = ("partition.kind=sites", f"clients={self._clients}")
            settings = [*sites, f"flower.client_keys={keys}", *settings]
        run_config = {"settings": shlex.join(settings), "out": str(out.resolve())}
        overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in run_config.items())
        command = ["flwr", "run", str(APP), "federation", "--stream", "--run-config", overrides]
        return subprocess.Popen(command, env=environment(self.folder))

    def run(self, settings: Sequence[str], out: Path, timeout_s: float = 3600.0) -> None:
        """Run droppeft as :meth:`submit` does, until it ends."""
        with self.submit(settings, out) as process, suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        if not (out / "result.json").exists():
            logs = self.folder.glob("*.log")
            texts = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in logs]
            raise SystemExit("\n\n".join(["the run did not finish", *texts]))


@contextmanager
def loopback(folder: Path, sites: Sequence[Path]) -> Iterator[Federation]:
    """Start a SuperLink and a SuperNode for each node file; stop them at the end."""
    federation = Federation(folder, sites)
    try:
        federation.start_all()
        yield federation
    finally:
        federation.stop_all()


def words(command: str) -> list[str]:
    """Split a command as a shell does."""
    return shlex.split(command.replace("\\\n", ""))


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
            each.bind((HERE, 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(port: int, timeout_s: float = 60.0) -> None:
    """Wait until a process listens on a port."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((HERE, port), timeout=1).close()
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


def main(sites: Path, out: Path, settings: Sequence[str]) -> None:
    """Run once, and print the accuracy and the hash of the adapter."""
    found = list(sites.glob("*/node.toml"))
    with tempfile.TemporaryDirectory() as folder, loopback(Path(folder), found) as federation:
        federation.run(settings, out)
    result = json.loads((out / "result.json").read_text())
    print(f"accuracy {result['global_accuracy']:.4f}, adapter {result['adapter_sha256'][:16]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
