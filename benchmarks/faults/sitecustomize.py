"""Stops a process at a place of its code until it is killed or released; used by `run.py`.

Python imports this module when it starts, in every process whose PYTHONPATH has this folder. The
first process that comes to an armed place leaves its id and waits.
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "DROPPEFT_TRAP"
"""Environment variable: the folder in which traps are armed."""

HOLD_S = 60.0

PLACES = {
    "send": ("droppeft.transports.flower.grid", "OverGrid._send"),
    "train": ("droppeft.client.local_training", "train"),
    "upload": ("flwr.supernode.start_client_internal", "push_object_contents_from_iterable"),
    "merge": ("droppeft.server.rounds", "close_round"),
    "save": ("droppeft.runs.checkpoints", "write_atomically"),
}
"""For each phase, the module and the function before which a process is stopped."""


def _trapped(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        folder = Path(os.environ[FOLDER])
        try:
            (folder / phase).rename(folder / "sprung")
        except FileNotFoundError:
            return function(*args, **kwargs)
        (folder / "pid").write_text(str(os.getpid()))
        end = time.monotonic() + HOLD_S
        while (folder / "sprung").exists() and time.monotonic() < end:
            time.sleep(0.05)
        return function(*args, **kwargs)

    return call


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for phase, (name, path) in PLACES.items():
            if name == module.__name__:
                holder: Any = module
                *outer, last = path.split(".")
                for part in outer:
                    holder = getattr(holder, part)
                setattr(holder, last, _trapped(phase, getattr(holder, last)))


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in {name for name, _ in PLACES.values()}:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader)
        return spec


if os.environ.get(FOLDER):
    sys.meta_path.insert(0, _Finder())
