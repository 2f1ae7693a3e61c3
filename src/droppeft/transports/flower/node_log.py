"""The log of a node, which says in full why its client did not run an instruction; ours.

Only codes of reasons leave a machine, so a site looks here. Loads no torch.
"""

import logging
from logging.handlers import RotatingFileHandler

from droppeft.client.client_state import state_dir
from droppeft.errors import DroppeftError
from droppeft.transports.flower.wire_format import one_line

NAME = "node.log"
"""Name of the log in the folder of client states."""

MOST_BYTES = 1_000_000
"""Size at which the log is renamed to ``node.log.1``, so that no server can fill the disk."""


def log_failure(what: str, error: Exception) -> None:
    """Write why an instruction was not run; with a traceback if nobody expected the error.

    Args:
        what: which instruction, such as ``"client 3, round 5"``.
        error: whose text, and that of its cause, may hold anything.
    """
    logger = logging.getLogger("droppeft.node")
    handler = _handler()
    if handler is not None:
        logger.addHandler(handler)
    try:
        expected = isinstance(error, DroppeftError)
        reasons = [one_line(str(each)) for each in (error, error.__cause__) if each is not None]
        logger.error("%s: %s", what, ": ".join(reasons), exc_info=None if expected else error)
    finally:
        if handler is not None:
            logger.removeHandler(handler)
            handler.close()


def _handler() -> logging.Handler | None:
    """Open the log; ``None`` if it cannot be written, which must not hide the reason itself."""
    try:
        folder = state_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / NAME
        path.touch(mode=0o600)
        handler = RotatingFileHandler(path, maxBytes=MOST_BYTES, backupCount=1, encoding="utf-8")
    except (OSError, DroppeftError):
        return None
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler
