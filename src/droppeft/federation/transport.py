"""How Plans reach devices and Updates come back; ``in_process`` is the first of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from droppeft.config import Config
from droppeft.data.partition import DeviceRows
from droppeft.data.tokens import TokenTable
from droppeft.errors import DroppeftError
from droppeft.federation.device import Workbench, take_turn
from droppeft.plans import Plan, Reply


class Transport(Protocol):
    """The seam between the round loop and wherever devices are."""

    def exchange(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Reply]]:
        """Yield (index of the Plan, its reply), one per Plan, in any order.

        Whose reply it is follows from the transport's own addressing, not from what it claims. The
        round closes after the last.
        """


@dataclass(frozen=True)
class Site:
    """What a process that runs devices holds.

    Attributes:
        config: of the run, resolved.
        bench: the shared backbone.
        table: all tokenised training rows.
        devices: each device's own rows of it.
    """

    config: Config
    bench: Workbench
    table: TokenTable
    devices: tuple[DeviceRows, ...]


@dataclass(frozen=True)
class InProcess:
    """Devices take turns in this process on one frozen backbone."""

    site: Site

    def exchange(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Reply]]:
        """Yield each device's Update, in Plan order."""
        site = self.site
        for index, plan in enumerate(plans):
            rows = site.devices[plan.device]
            yield index, take_turn(site.bench, site.table, rows, site.config, plan)


TRANSPORTS: dict[str, Callable[[Site], Transport]] = {"in_process": InProcess}


def transport_named(name: str) -> Callable[[Site], Transport]:
    """Look a transport up.

    Raises:
        DroppeftError: no such transport; the message lists those there are.
    """
    if name not in TRANSPORTS:
        raise DroppeftError(
            f"transport={name}: unknown transport; known are {', '.join(TRANSPORTS)}"
        )
    return TRANSPORTS[name]
