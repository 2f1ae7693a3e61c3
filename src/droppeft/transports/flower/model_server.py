"""A process beside a SuperNode that keeps texts and model from one message to the next; ours.

A SuperNode starts a new ClientApp process for every message, which would load the model every
time. That process hands its message to this one instead, over a Unix socket in a folder that only
its user can enter. It is started by the first message and ends with the SuperNode, or when nothing
was asked for a while.

Run as ``python -m droppeft.transports.flower.model_server SOCKET WATCHED_PID``.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from droppeft.errors import DroppeftError
from droppeft.messages import Failure
from droppeft.transports.flower.wire_format import Packed, RunContext, pack_reply

MODULE = "droppeft.transports.flower.model_server"

IDLE_S = 600.0
"""A model server that was asked nothing for so long ends."""

START_S = 60.0
"""Most that a new one may take before it can be asked."""

LONGEST_FOLDER = 80
"""The path of a Unix socket has 107 bytes at most."""


def ask(packed: Packed, run_context: RunContext, node_id: int, node: Mapping[str, Any]) -> Packed:
    """Have the model server of this node and run answer, starting it if there is none.

    Args:
        packed: an instruction.
        errand: what came with it, which tells runs apart.
        node_id: Flower's; nodes of one machine have model serveres of their own.
        node: the node's configuration.
    """
    mark = json.dumps(
        [node_id, dict(run_context.config), dict(run_context.identity)], sort_keys=True
    )
    place = _folder() / f"{hashlib.sha256(mark.encode()).hexdigest()[:16]}.sock"
    try:
        with _connection(place) as connection:
            _send(connection, packed)
            connection.send_bytes(json.dumps(dict(node)).encode())
            return _receive(connection)
    except (EOFError, OSError) as error:
        said = f"{type(error).__name__} {error}".strip()
        reason = f"its model server is gone ({said}); see {_log_of(place)}"
        return pack_reply(Failure(-1, reason))


def serve(place: Path, watched_pid: int) -> None:
    """Answer at a socket until the watched process is gone or nobody has asked for long."""
    watch = _Watch(place, watched_pid)
    with Listener(str(place), "AF_UNIX", backlog=64) as listener:
        threading.Thread(target=watch.run, daemon=True).start()
        from droppeft.transports.flower.client_runtime import (
            answer,  # loads torch, after the socket is there
        )

        while True:
            connection = listener.accept()
            with connection, watch.working():
                try:
                    packed, node = _receive(connection), json.loads(connection.recv_bytes())
                    if not connection.poll():  # else there is the end of who asked
                        _send(connection, answer(packed, node))
                except (EOFError, OSError):
                    continue  # whoever asked is gone


class _Watch:
    """Ends this process when it has outlived its use."""

    def __init__(self, place: Path, watched_pid: int) -> None:
        self._place = place
        self._watched_pid = watched_pid
        self._busy = False
        self._since = time.monotonic()

    @contextmanager
    def working(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy, self._since = False, time.monotonic()

    def run(self) -> None:
        while self._needed():
            time.sleep(0.5)
        with suppress(OSError):
            self._place.unlink(missing_ok=True)
            if _log_of(self._place).stat().st_size == 0:
                _log_of(self._place).unlink()
        os._exit(0)

    def _needed(self) -> bool:
        idle = not self._busy and time.monotonic() - self._since > IDLE_S
        return _alive(self._watched_pid) and self._place.exists() and not idle


@contextmanager
def _connection(place: Path) -> Iterator[Connection]:
    connection = _connect(place)
    if connection is None:
        with _locked(place.parent / "lock"):
            connection = _connect(place) or _start(place)
    with connection:
        yield connection


def _connect(place: Path) -> Connection | None:
    try:
        return Client(str(place), "AF_UNIX")
    except (FileNotFoundError, ConnectionRefusedError):
        return None


def _start(place: Path) -> Connection:
    place.unlink(missing_ok=True)
    # The ClientApp's parent belongs to the SuperNode and ends with it.
    command = [sys.executable, "-m", MODULE, str(place), str(os.getppid())]
    with _log_of(place).open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        connection = _connect(place)
        if connection is not None:
            return connection
        time.sleep(0.05)
    raise ConnectionRefusedError("could not be started; flower.model_server=false does without")


def _folder() -> Path:
    """A folder for sockets that nobody else can enter.

    Raises:
        DroppeftError: somebody else made it.
    """
    folder = Path(tempfile.gettempdir()) / f"droppeft-{os.getuid()}"
    if len(str(folder)) > LONGEST_FOLDER:
        folder = Path("/tmp") / folder.name
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise DroppeftError(f"{folder} can be entered by others; remove it")
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _log_of(place: Path) -> Path:
    return place.with_suffix(".log")


def _send(connection: Connection, packed: Packed) -> None:
    connection.send_bytes(packed.head.encode())
    connection.send_bytes(packed.tensors)


def _receive(connection: Connection) -> Packed:
    return Packed(connection.recv_bytes().decode(), connection.recv_bytes())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
