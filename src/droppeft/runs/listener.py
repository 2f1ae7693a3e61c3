"""The interface of those who are told about the progress of a run."""

from collections.abc import Mapping
from typing import Any, Protocol

from droppeft.messages.reply import Reply
from droppeft.runs.ledger import RoundRow


class Listener(Protocol):
    """Is told about the progress of a run; the screen is one listener, a tracker another."""

    def preparing(self, what: str) -> None:
        """A step of preparation or of the final evaluation begins."""

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """The rounds begin.

        Args:
            about: what identifies the run: method, model, data and more.
            rows: the rounds that an earlier process has finished.
        """

    def replied(self, reply: Reply) -> None:
        """A client's reply has arrived."""

    def round_done(self, row: RoundRow) -> None:
        """A round has been merged, evaluated and saved."""

    def finished(self, result: Mapping[str, Any]) -> None:
        """The result has been written."""
