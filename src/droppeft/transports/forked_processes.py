"""Processes that are forked from this one, share its memory until they write, and run calls. Ours.

They die with this process, however it ends, and leave Ctrl-C to it.
"""

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

PR_SET_PDEATHSIG = 1
"""Linux's prctl(2) option: the signal that a process gets when its parent dies."""

JOIN_S = 5.0
"""Seconds that a process has to end after it was killed, or after its pipe was closed."""

Call = tuple[str, tuple[Any, ...]]
"""The name of a function, and its arguments."""


class ProcessLost(Exception):
    """A process ended in the middle of a call.

    Attributes:
        call: index of the call.
        how: what is known about it, as ``killed by SIGKILL``.
    """

    def __init__(self, call: int, how: str) -> None:
        super().__init__(f"call {call}: {how}")
        self.call, self.how = call, how


class ForkedProcesses:
    """Processes that run calls of some functions.

    What the functions use need not be pickled, since it is there when the processes are forked.
    Arguments and results are pickled.

    Args:
        count: number of processes.
        functions: that can be called, by name.
        begin: called in each process before its first call.
    """

    def __init__(
        self, count: int, functions: Mapping[str, Callable[..., Any]], begin: Callable[[], None]
    ) -> None:
        self._functions, self._begin = functions, begin
        self._processes: dict[Connection, Any] = {}
        try:
            for _ in range(count):
                self._fork()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._processes)

    def run(
        self, calls: Sequence[Call], timeout_s: float | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield the index and the result of each call, as they finish.

        Calls begin in their order, each in the process that is free first.

        Args:
            calls: to be made.
            timeout_s: most seconds until the next call has finished; ``None`` for no limit.

        Raises:
            TimeoutError: no call has finished in time; no call can be made any more.
            ProcessLost: a process has ended; no call can be made any more.
            BaseException: what a call raised; no call can be made any more.
        """
        waiting = deque(enumerate(calls))
        busy: dict[Connection, int] = {}

        def give(connection: Connection) -> None:
            if waiting:
                busy[connection], call = waiting.popleft()
                with suppress(BrokenPipeError):  # it is noticed when the result is read
                    connection.send(call)

        try:
            for connection in self._processes:
                give(connection)
            while busy:
                finished = wait(list(busy), timeout_s)
                if not finished:
                    raise TimeoutError
                for ready in finished:
                    assert isinstance(ready, Connection)
                    result = self._result(ready, busy[ready])
                    index = busy.pop(ready)
                    give(ready)
                    yield index, result
        finally:
            if busy:
                self.close()

    def close(self) -> None:
        """End the processes, also in the middle of a call."""
        for connection, process in self._processes.items():
            process.kill()
            process.join(JOIN_S)
            connection.close()
        self._processes = {}

    def _result(self, connection: Connection, call: int) -> Any:
        try:
            is_result, value = connection.recv()
        except (EOFError, ConnectionResetError):
            raise ProcessLost(call, self._how_it_ended(connection)) from None
        if not is_result:
            raise value
        return value

    def _how_it_ended(self, connection: Connection) -> str:
        process = self._processes[connection]
        process.join(JOIN_S)
        code = process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def _fork(self) -> None:
        context: Any = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        inherited = [*self._processes, here]
        process = context.Process(
            target=self._work, args=(there, inherited, os.getpid()), daemon=True
        )
        # A Ctrl-C while the process is forked is for the parent; the child unblocks what it wants.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()
        self._processes[here] = process

    def _work(self, connection: Connection, inherited: list[Connection], parent: int) -> None:
        """Run calls until the parent closes the pipe or dies."""
        gc.freeze()  # the collector would write to what is shared, which copies it
        for other in inherited:
            other.close()  # otherwise a pipe stays open when the parent dies
        _die_with(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        self._begin()
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            while True:
                name, arguments = connection.recv()
                connection.send(self._answer(name, arguments))

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        try:
            return True, self._functions[name](*arguments)
        except BaseException as error:
            return False, _with_traceback(error)


def can_fork() -> bool:
    """Whether this system forks processes that use torch safely, and ends them with their parent.

    macOS can fork, but its libraries do not work in the new process.
    """
    return sys.platform == "linux"


def _die_with(parent: int) -> None:
    """Have the system kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def _with_traceback(error: BaseException) -> BaseException:
    """Return the error with its traceback as a note, or one that can be pickled in its place."""
    lines = "".join(traceback.format_exception(error))
    error.add_note(f"in process {os.getpid()}:\n{lines}")
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}\n{lines}")
