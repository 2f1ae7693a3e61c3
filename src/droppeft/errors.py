"""The exception whose message is written for the user."""


class DroppeftError(ValueError):
    """An error that the user can correct, described in one sentence.

    The sentence says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2; library callers may catch it as a ``ValueError``.
    """
