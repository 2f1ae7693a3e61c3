"""The log of a node, which says in full what leaves its machine only as a code; ours.

It is the file ``node.log`` in the folder of client states. Loads no torch.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from droppeft.client.client_state import state_dir
from droppeft.errors import DroppeftError
from droppeft.files import make_private
from droppeft.refusals import ERROR, Refused
from droppeft.transports.flower.wire_format import Packed, one_line, pack_reply

NAME = "node.log"
"""Name of the log in the folder of client states."""

MOST_BYTES = 1_000_000
"""Size at which the log is renamed to ``node.log.1``, so that no server can fill the disk."""

_log = logging.getLogger("droppeft")


class _NodeLog(RotatingFileHandler):
    """The open log, which only its owner can read, also after it was renamed."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).touch(mode=0o600)
        return super()._open()


@contextmanager
def in_node_log() -> Iterator[None]:
    """Write the warnings of droppeft to the node's log too.

    If it cannot be written, they are on the process's error output alone.
    """
    handler = None if any(isinstance(one, _NodeLog) for one in _log.handlers) else _opened()
    if handler is None:
        yield
        return
    _log.addHandler(handler)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        handler.close()


def log_failure(what: str, error: Exception) -> None:
    """Write why an instruction was not run; with a traceback if nobody expected the error.

    Args:
        what: which instruction, such as ``"client 3, round 5"``.
        error: whose text, and that of its cause, may hold anything.
    """
    expected = isinstance(error, DroppeftError)
    reasons = [one_line(str(each)) for each in (error, error.__cause__) if each is not None]
    with in_node_log():
        _log.error("%s: %s", what, ": ".join(reasons), exc_info=None if expected else error)


def refused_reply(what: str, error: Exception) -> Packed:
    """Log why an instruction was not run, and return the packed code of the reason.

    Args:
        what, error: see :func:`log_failure`.
    """
    log_failure(what, error)
    return pack_reply(error if isinstance(error, Refused) else Refused(ERROR))


def _opened() -> _NodeLog | None:
    try:
        folder = state_dir()
        make_private(folder)
        handler = _NodeLog(folder / NAME, maxBytes=MOST_BYTES, backupCount=1, encoding="utf-8")
    except (OSError, DroppeftError):
        return None
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler
