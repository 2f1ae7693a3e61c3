"""The example that starts a SuperLink and SuperNodes on this machine, as a module for tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLE = Path(__file__).parents[1] / "examples" / "flower_on_loopback.py"


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flower_on_loopback", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = _loaded()
