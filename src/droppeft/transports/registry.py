"""The transports by name: adding one is a file, a line here, and a row in its test."""

import os
from contextlib import AbstractContextManager

from droppeft.client.run_inputs import Loaded
from droppeft.errors import DroppeftError
from droppeft.transports.base import Connect, Transport
from droppeft.transports.in_process import in_process


def flower(loaded: Loaded) -> AbstractContextManager[Transport]:
    """Run clients in processes of Flower's simulation engine."""
    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Seconds of imports that others need not wait for.
    from droppeft.transports.flower.simulation import simulated

    return simulated(loaded)


ENGINE_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Read when flwr and ray are imported: nothing is reported to anybody, and Ray's processes are
those of this environment. Whoever has set one already is left alone."""


TRANSPORTS: dict[str, Connect] = {"in_process": in_process, "flower": flower}


def transport_named(name: str) -> Connect:
    """Look a transport up.

    Raises:
        DroppeftError: no such transport; the message lists those there are.
    """
    if name not in TRANSPORTS:
        raise DroppeftError(
            f"transport={name}: unknown transport; known are {', '.join(TRANSPORTS)}"
        )
    return TRANSPORTS[name]
