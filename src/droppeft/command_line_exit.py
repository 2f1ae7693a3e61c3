"""Exit codes of the commands, and leaving with one of them. Ours."""

import sys
from typing import NoReturn

USER_ERROR, FAILED, STOPPED = 2, 1, 130


def leave(message: str, code: int) -> NoReturn:
    """Write one line to stderr and exit."""
    sys.stderr.write(f"droppeft: {message}\n")
    sys.exit(code)
