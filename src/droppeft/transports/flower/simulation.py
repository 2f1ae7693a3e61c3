"""Flower's simulation engine, with one virtual SuperNode per client, in processes of Ray."""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from droppeft.client.run_inputs import Loaded
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.transports.base import Transport
from droppeft.transports.flower.client_app import introduce
from droppeft.transports.flower.grid import over_grid
from droppeft.transports.flower.records import MOST_REASON
from droppeft.transports.flower.simulated_clients import simulated_app
from droppeft.transports.flower.wire_format import one_line

GRACE_S = 3.0
"""Seconds within which the engine may end by itself."""

STOP_S = 30.0
"""Seconds within which it must end when its processes are killed."""

ACTOR = "ray::ClientAppActor"
"""Ray's name of the processes in which Flower runs clients."""

NICENESS = "RAY_worker_niceness"
"""Ray's environment variable for the priority of the processes in which it runs clients.

With its default of 15 they get next to no time while other programs keep the cores busy.
"""

ATTEMPTS = 3
"""How often Ray is started: on a busy machine it gives up when a process of its own is late."""


@contextmanager
def simulated(loaded: Loaded) -> Iterator[Transport]:
    """Run Flower's simulation engine in a thread, with one virtual SuperNode per client.

    Raises:
        DroppeftError: the engine could not be started or has stopped.
    """
    engine = _Engine(loaded.config, loaded.workers)
    try:
        yield over_grid(engine.grid(), loaded, engine.check)
    finally:
        engine.stop()


class _Engine:
    """Flower's simulation engine in a thread; its ServerApp only hands over the grid."""

    def __init__(self, config: Config, workers: int) -> None:
        self._grids: queue.Queue[Grid] = queue.Queue()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._levels = {name: logging.getLogger(name).level for name in ("flwr", "ray")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        server = ServerApp()
        server.main()(self._hand_over)
        self._thread = threading.Thread(
            target=self._run, args=(server, config, workers), daemon=True
        )
        self._thread.start()

    def grid(self) -> Grid:
        """Return the engine's grid, when it has started."""
        while True:
            self.check()
            try:
                return self._grids.get(timeout=0.5)
            except queue.Empty:
                continue

    def check(self) -> None:
        """Check that the engine is running.

        Raises:
            DroppeftError: it has not started, or has stopped.
        """
        if isinstance(self._error, DroppeftError):
            raise self._error
        if not self._thread.is_alive():
            reason = f": {one_line(str(self._error), MOST_REASON)}" if self._error else ""
            raise DroppeftError(
                f"Flower's simulation engine stopped{reason}; complete rounds are saved"
            )

    def stop(self) -> None:
        """End the engine and its processes, also those in the middle of a local training."""
        self._done.set()
        self._thread.join(GRACE_S)
        end = time.monotonic() + STOP_S
        while self._thread.is_alive() and time.monotonic() < end:
            # Otherwise the engine would wait for local trainings whose replies are not needed.
            for process in _processes():
                process.kill()
            self._thread.join(0.5)
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)

    def _hand_over(self, grid: Grid, context: Context) -> None:
        self._grids.put(grid)
        self._done.wait()

    def _run(self, server: ServerApp, config: Config, workers: int) -> None:
        try:
            _start_ray(workers * config.threads)
            resources: dict[str, Any] = {"client_resources": _client_resources(config)}
            run_simulation(
                server, simulated_app(introduce), config.clients, backend_config=resources
            )
        except BaseException as error:
            self._error = error


def _start_ray(cores: int) -> None:
    """Start Ray, unless it runs. Flower would start it too, but only once, and hide its error.

    Raises:
        DroppeftError: it did not start.
    """
    os.environ.setdefault(NICENESS, "0")
    for attempt in range(1, ATTEMPTS + 1):
        if ray.is_initialized():
            return
        try:
            ray.init(
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        except Exception as error:
            ray.shutdown()
            if attempt == ATTEMPTS:
                reason = one_line(str(error), MOST_REASON)
                raise DroppeftError(
                    f"Ray did not start in {ATTEMPTS} attempts ({reason}); try again when the "
                    "machine is less busy, or use transport=in_process"
                ) from error


def _client_resources(config: Config) -> dict[str, float]:
    """Resources of a client, so that as many run at once as Ray was told to have cores for.

    Flower passes them on to Ray. With ``max_restarts`` Ray restarts a process that died. Without
    it, Flower's pool would keep the dead process, and every instruction given to it would be lost.
    """
    return {
        "num_cpus": config.threads,
        "num_gpus": 1.0 if config.accelerator == "cuda" else 0.0,
        "max_restarts": -1,
    }


def _processes() -> list[psutil.Process]:
    """Descendants of this process in which Ray runs clients."""
    clients = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if ACTOR in " ".join(process.cmdline()):
                clients.append(process)
    return clients
