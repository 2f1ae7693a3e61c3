"""The model server: a process beside a SuperNode that keeps data and model loaded; ours.

A SuperNode starts a new ClientApp process for every message, and each would have to load the model.
The ClientApp process instead sends its message to the model server, over a Unix socket in a folder
that only its user can enter. The first message starts the model server. It ends with the SuperNode,
or when it has received no message for some time.

Run as ``python -m droppeft.transports.flower.model_server SOCKET WATCHED_PID``.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from filelock import FileLock

from droppeft.errors import DroppeftError
from droppeft.refusals import Refused
from droppeft.transports.flower.wire_format import Packed

MODULE = "droppeft.transports.flower.model_server"

IDLE_S = 600.0
"""Seconds without a message after which a model server ends."""

START_S = 60.0
"""Seconds within which a new model server must accept connections."""

DYING_S = 1.0
"""Seconds for which the socket of a killed process may still accept connections."""

KILLED = (EOFError, ConnectionResetError, BrokenPipeError)
"""Errors of a connection to a process that is killed."""

LONGEST_FOLDER = 80
"""Largest length of the folder's path: the path of a Unix socket has at most 107 bytes."""


def ask(packed: Packed, node_id: int, node_file: str) -> Packed:
    """Have a packed instruction run by the model server of this node, and return the packed reply.

    The model server is started if there is none, and once more if it ends. It is the same for all
    runs, so that no server can fill the node's memory with models.

    Args:
        packed: the instruction and its run context.
        node_id: Flower's id of the node; each node has a model server of its own.
        node_file: path of the site's file.

    Raises:
        Refused: the model server ended or could not be started.
        DroppeftError: other users can enter the folder of its socket.
    """
    key = f"{node_id} {node_file}"
    place = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.sock"
    try:
        with suppress(*KILLED):
            return _answer(place, packed, node_file)
        time.sleep(DYING_S)
        return _answer(place, packed, node_file)
    except (EOFError, OSError) as error:
        detail = f"{type(error).__name__} {error}".strip()
        raise Refused("model_server") from DroppeftError(f"{detail}; see {_log_of(place)}")


def _answer(place: Path, packed: Packed, node_file: str) -> Packed:
    with _connection(place) as connection:
        _send(connection, packed)
        connection.send_bytes(node_file.encode())
        return _receive(connection)


def serve(place: Path, watched_pid: int) -> None:
    """Run instructions that arrive at a socket.

    The process ends when the watched process is gone, or after :data:`IDLE_S` without a message.

    Args:
        place: path of the socket.
        watched_pid: id of the process with which this one ends.
    """
    watch = _Watch(place, watched_pid)
    with Listener(str(place), "AF_UNIX", backlog=64) as listener:
        threading.Thread(target=watch.run, daemon=True).start()
        # Loads torch, which takes seconds, after the socket accepts connections.
        from droppeft.transports.flower.client_runtime import run_packed

        while True:
            connection = listener.accept()
            with connection, watch.working():
                try:
                    packed, node_file = _receive(connection), connection.recv_bytes().decode()
                    if not connection.poll():  # readable here means closed by the ClientApp
                        _send(connection, run_packed(packed, node_file))
                except (EOFError, OSError):
                    continue  # the ClientApp process is gone


class _Watch:
    """Ends this process when it is no longer needed."""

    def __init__(self, place: Path, watched_pid: int) -> None:
        self._place = place
        self._watched_pid = watched_pid
        self._busy = False
        self._since = time.monotonic()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Mark the process as busy."""
        self._busy = True
        try:
            yield
        finally:
            self._busy, self._since = False, time.monotonic()

    def run(self) -> None:
        """Wait until the process is not needed, remove its files, and end it."""
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
    """Connect to the model server at a socket, and start it if there is none."""
    connection = _connect(place)
    if connection is None:
        with FileLock(place.parent / "lock", mode=0o600):
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
    # The parent of the ClientApp process belongs to the SuperNode and ends with it.
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
    raise ConnectionRefusedError("could not be started; flower.model_server=false runs without it")


def _folder() -> Path:
    """Return the folder for sockets, which no other user can enter.

    Raises:
        DroppeftError: it belongs to another user, or other users can enter it.
    """
    folder = Path(tempfile.gettempdir()) / f"droppeft-{os.getuid()}"
    if len(str(folder)) > LONGEST_FOLDER:
        folder = Path("/tmp") / folder.name
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()  # another user could have made a link
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise DroppeftError(f"{folder} can be entered by other users; remove it")
    return folder


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
