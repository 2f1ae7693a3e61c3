"""Checks of the installation, for ``droppeft doctor``; ours.

Each check is a function that is listed here. It imports what it needs inside, so that a broken
library fails only the checks that need it.
"""

from collections.abc import Callable

from droppeft.doctor.builtin import check_builtin_model, check_data_folder
from droppeft.doctor.finding import Finding, problem
from droppeft.doctor.flower import check_flower
from droppeft.doctor.folders import (
    check_cache_folder,
    check_runs_folder,
    check_state_folder,
    check_temporary_folder,
)
from droppeft.doctor.machine import check_memory, check_processor, check_torch
from droppeft.doctor.packages import (
    check_dependencies,
    check_pins,
    check_python,
    check_quantization,
    repair,
)

__all__ = ["CHECKS", "Finding", "examine"]

CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": check_python,
    "dependencies": check_dependencies,
    "pinned versions": check_pins,
    "quantisation": check_quantization,
    "torch": check_torch,
    "processor": check_processor,
    "memory": check_memory,
    "built-in model": check_builtin_model,
    "data folder": check_data_folder,
    "Flower": check_flower,
    "runs": check_runs_folder,
    "cache": check_cache_folder,
    "client state": check_state_folder,
    "temporary files": check_temporary_folder,
}
"""The checks by name, in the order in which they are shown."""


def examine() -> dict[str, Finding]:
    """Run all checks. A check that raises an error is a problem, and the others still run."""
    return {name: _finding(check) for name, check in CHECKS.items()}


def _finding(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # the user gets a table, whatever is broken
        reason = " ".join(str(error).split())
        return problem(f"this check failed: {type(error).__name__}: {reason}", repair())
