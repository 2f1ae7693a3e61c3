"""Processes to be killed, forked off one that has imported torch and transformers already.

Importing them takes longer than the tiny runs that are killed. The server of ``multiprocessing``
has run no backward pass, after which torch refuses to go on in a forked process.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess


def started(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process that does ``work`` with this one's environment; of a module, not a closure."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["droppeft.server.run"])
    process = context.Process(target=_work, args=(dict(os.environ), work, arguments), daemon=True)
    process.start()
    return process


def _work(
    environment: Mapping[str, str], work: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work(*arguments)
