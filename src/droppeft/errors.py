"""Exceptions that the command line reports without a traceback."""

from pathlib import Path


class DroppeftError(ValueError):
    """An error that the user can correct, described in one sentence.

    The sentence says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2; library callers may catch it as a ``ValueError``.
    """


class Interrupted(Exception):
    """The user stopped the run in ``folder``; ``round`` is the last round that is saved."""

    def __init__(self, folder: Path, round: int) -> None:
        super().__init__(folder, round)
        self.folder = folder
        self.round = round
