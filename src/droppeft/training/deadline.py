"""How long a local training may take; ours."""

import time
from dataclasses import dataclass

from droppeft.refusals import Refused


@dataclass(frozen=True)
class Deadline:
    """The end of the time that a site gives a local training.

    Attributes:
        start: when the local training began, by ``time.perf_counter``.
        seconds: that it may take.
    """

    start: float
    seconds: float

    def check(self) -> None:
        """Stop if the time is over.

        Raises:
            Refused: it is.
        """
        if time.perf_counter() - self.start > self.seconds:
            raise Refused("seconds", self.seconds)
