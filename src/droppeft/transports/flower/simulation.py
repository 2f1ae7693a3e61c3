"""Flower's simulation engine: one virtual SuperNode per client, in Ray's processes."""

import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from droppeft.client.run_inputs import Loaded
from droppeft.config import Config, available_cores
from droppeft.errors import DroppeftError
from droppeft.transports.base import Transport
from droppeft.transports.flower import client_app
from droppeft.transports.flower.grid import over_grid
from droppeft.transports.flower.records import error_reason

GRACE_S = 3.0
"""What the engine may take to end by itself."""

STOP_S = 30.0
"""What it may take when its processes are ended for it."""

ACTOR = "ray::ClientAppActor"
"""How Ray names the processes in which Flower runs clients."""


@contextmanager
def simulated(loaded: Loaded) -> Iterator[Transport]:
    """Run Flower's simulation engine beside this thread, one virtual SuperNode per client.

    Raises:
        DroppeftError: the engine could not be started or has stopped.
    """
    engine = _Engine(loaded.config)
    try:
        yield over_grid(engine.grid(), loaded, engine.check)
    finally:
        engine.stop()


class _Engine:
    """Flower's simulation engine in a thread; its ServerApp only lends us the grid."""

    def __init__(self, config: Config) -> None:
        self._grids: queue.Queue[Grid] = queue.Queue()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._levels = {name: logging.getLogger(name).level for name in ("flwr", "ray")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        server = ServerApp()
        server.main()(self._lend)
        self._thread = threading.Thread(
            target=self._run, args=(server, config.clients, _resources(config)), daemon=True
        )
        self._thread.start()

    def grid(self) -> Grid:
        """Wait for the engine."""
        while True:
            self.check()
            try:
                return self._grids.get(timeout=0.5)
            except queue.Empty:
                continue

    def check(self) -> None:
        """Raise if the engine is gone.

        Raises:
            DroppeftError: with what it said.
        """
        if not self._thread.is_alive():
            said = f": {error_reason(0, str(self._error))}" if self._error else ""
            raise DroppeftError(
                f"Flower's simulation engine stopped{said}; rounds that are complete are saved"
            )

    def stop(self) -> None:
        """End the engine and its processes, also those that are in the middle of a turn."""
        self._done.set()
        self._thread.join(GRACE_S)
        end = time.monotonic() + STOP_S
        while self._thread.is_alive() and time.monotonic() < end:
            # The engine would wait for turns that nobody else waits for.
            for process in _processes():
                process.kill()
            self._thread.join(0.5)
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)

    def _lend(self, grid: Grid, context: Context) -> None:
        self._grids.put(grid)
        self._done.wait()

    def _run(self, server: ServerApp, nodes: int, resources: dict[str, Any]) -> None:
        try:
            run_simulation(server, client_app.app, nodes, backend_config=resources)
        except BaseException as error:
            self._error = error


def _resources(config: Config) -> dict[str, Any]:
    """As many clients at once as cores allow with the run's thread count each.

    Flower hands its "client resources" to Ray as they are, so they may ask that a process which
    died is started again. Flower's pool keeps the dead one and would lose every turn given to it.
    """
    cores = max(available_cores(), config.threads)
    on_gpu = config.accelerator == "cuda"
    return {
        "client_resources": {
            "num_cpus": config.threads,
            "num_gpus": 1.0 if on_gpu else 0.0,
            "max_restarts": -1,
        },
        "init_args": {
            "num_cpus": cores,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.CRITICAL,
        },
    }


def _processes() -> list[psutil.Process]:
    """Ray's processes that run clients, below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if ACTOR in " ".join(process.cmdline()):
                found.append(process)
    return found
