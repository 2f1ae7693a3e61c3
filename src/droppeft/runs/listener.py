"""Who is told how a run goes."""

from collections.abc import Mapping
from typing import Any, Protocol

from droppeft.runs.ledger import RoundRow
from droppeft.messages import Reply


class Listener(Protocol):
    """Who is told how a run goes; the screen is one."""

    def preparing(self, what: str) -> None:
        """A step before round 1 begins."""

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """Rounds begin; ``rows`` are those that an earlier process finished."""

    def replied(self, reply: Reply) -> None:
        """A client of the present round has answered."""

    def round_done(self, row: RoundRow) -> None:
        """A round is merged, measured and saved."""

    def finished(self, result: Mapping[str, Any]) -> None:
        """The result is on disk."""
