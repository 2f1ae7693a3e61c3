"""The one exception that a person is meant to read."""


class DroppeftError(ValueError):
    """A mistake in what the user gave us, told in one sentence.

    The sentence says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2; library callers may catch it as a ``ValueError``.
    """
