"""How Plans reach devices and replies come back: the seam between the round loop and the world."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from droppeft.errors import DroppeftError
from droppeft.federation.device import carry_out
from droppeft.federation.loading import Loaded, Site, site_of
from droppeft.plans import Plan, Reply


@dataclass(frozen=True)
class Arrival:
    """A reply as the transport hands it over.

    Attributes:
        index: which of the Plans it answers, by the transport's own addressing.
        reply: what came back, or why nothing did.
        sent_bytes, received_bytes: what was sent for it and back, framing included; ``None``
            where nothing was framed.
    """

    index: int
    reply: Reply
    sent_bytes: int | None = None
    received_bytes: int | None = None


class Transport(Protocol):
    """Whatever carries a round's Plans to devices."""

    def exchange(self, plans: Sequence[Plan]) -> Iterator[Arrival]:
        """Yield one arrival per Plan, in any order; the round closes after the last."""


Connect = Callable[[Loaded], AbstractContextManager[Transport]]
"""Opens a transport for a run; leaving the context closes it."""


@dataclass(frozen=True)
class InProcess:
    """Devices take turns in this process on one frozen backbone."""

    site: Site

    def exchange(self, plans: Sequence[Plan]) -> Iterator[Arrival]:
        """Yield each device's reply, in Plan order."""
        site = self.site
        for index, plan in enumerate(plans):
            rows = site.devices[plan.device]
            yield Arrival(index, carry_out(site.bench, site.table, rows, site.config, plan))


def in_process(loaded: Loaded) -> AbstractContextManager[Transport]:
    """Run devices here, on the server's own backbone."""
    return nullcontext(InProcess(site_of(loaded)))


def flower(loaded: Loaded) -> AbstractContextManager[Transport]:
    """Run devices in processes of Flower's simulation engine."""
    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Seconds of imports that others need not wait for.
    from droppeft.federation.flower.simulation import simulated

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
