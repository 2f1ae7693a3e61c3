"""Pass the progress of a run on to several listeners, each with some of the methods. Ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from droppeft.errors import DroppeftError
from droppeft.messages.reply import Reply
from droppeft.runs.ledger import RoundRow

EVENTS = ("preparing", "started", "replied", "round_done", "finished")
"""The methods of a :class:`~droppeft.runs.listener.Listener`."""


class Callbacks:
    """A listener that tells others, in their order.

    An error that one of them raises ends the run; its finished rounds are saved.

    Args:
        listeners: objects with one or more of the methods of
            :class:`~droppeft.runs.listener.Listener`.

    Raises:
        DroppeftError: one has none of these methods, or is a class.
    """

    def __init__(self, listeners: Sequence[object]) -> None:
        for one in listeners:
            if isinstance(one, type):
                raise DroppeftError(f"callback {one.__name__} is a class; give an object of it")
            if not any(callable(getattr(one, event, None)) for event in EVENTS):
                raise DroppeftError(
                    f"callback {type(one).__name__} has none of the methods {', '.join(EVENTS)}"
                )
        self._listeners = tuple(listeners)

    def preparing(self, what: str) -> None:
        """A step of preparation or of the final evaluation begins."""
        self._tell("preparing", what)

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """The rounds begin."""
        self._tell("started", about, rows)

    def replied(self, reply: Reply) -> None:
        """A client's reply has arrived."""
        self._tell("replied", reply)

    def round_done(self, row: RoundRow) -> None:
        """A round has been merged, evaluated and saved."""
        self._tell("round_done", row)

    def finished(self, result: Mapping[str, Any]) -> None:
        """The result has been written."""
        self._tell("finished", result)

    def _tell(self, event: str, *facts: object) -> None:
        for one in self._listeners:
            method = getattr(one, event, None)
            if method is not None:
                method(*facts)
