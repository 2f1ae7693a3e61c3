"""Start processes that tests kill, forked from one that has imported torch and transformers.

Importing them takes longer than the tiny runs that are killed. The fork server of
``multiprocessing`` has run no backward pass, after which torch does not work in a forked process.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess


def started(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start a process that calls ``work``, a function of a module, with the current environment."""
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
