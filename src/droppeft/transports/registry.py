"""The transports by name. A new one needs a module and an entry in :data:`TRANSPORTS`."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from droppeft.client.run_inputs import Loaded, clients_of
from droppeft.errors import DroppeftError
from droppeft.extras import require
from droppeft.transports.base import Connect, Transport
from droppeft.transports.in_process import InProcess
from droppeft.transports.workers import Workers


@contextmanager
def in_process(loaded: Loaded) -> Iterator[Transport]:
    """Open the transport on this machine alone; one worker is this process."""
    inner = InProcess(clients_of(loaded))
    if loaded.workers == 1:
        torch.set_num_threads(loaded.config.threads)
        yield inner
        return
    workers = Workers(loaded, inner, loaded.workers)
    try:
        yield workers  # this process stays at one thread, so that a later run can fork it too
    finally:
        workers.close()


def flower(loaded: Loaded) -> AbstractContextManager[Transport]:
    """Open Flower's simulation engine, which runs clients in processes of its own."""
    torch.set_num_threads(loaded.config.threads)
    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Importing Flower takes seconds, for which other transports should not wait.
    from droppeft.transports.flower.simulation import simulated

    return simulated(loaded)


ENGINE_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment variables that are set, unless they are already, before flwr and ray are imported.

Nothing is reported to anybody, and Ray's processes use this Python environment.
"""


TRANSPORTS: dict[str, Connect] = {"in_process": in_process, "flower": flower}


def transport_named(name: str) -> Connect:
    """Return the transport of a name.

    Raises:
        DroppeftError: there is no such transport, and the message lists all; or a package that it
            needs is not installed.
    """
    if name not in TRANSPORTS:
        raise DroppeftError(
            f"transport={name}: unknown transport; known are {', '.join(TRANSPORTS)}"
        )
    if name == "flower":
        require("flower", "transport=flower")
    return TRANSPORTS[name]
