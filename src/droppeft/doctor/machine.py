"""Checks of the machine: torch and its accelerator, processor, memory; ours."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from droppeft.doctor.finding import Finding, note, ok, problem, size
from droppeft.doctor.packages import reinstall

TORCH_PATIENCE_S = 120

ENOUGH_MEMORY_BYTES = 2e9
"""Ample for a run with the built-in model and data."""

MEMORY = Path("/proc/meminfo")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The memory limit of a container; the file contains ``max`` if there is none."""


def check_torch() -> Finding:
    """Import torch in a separate process and check on which devices it can compute."""
    # -P: a run would not import a file torch.py of the current folder.
    command = [sys.executable, "-P", "-m", "droppeft.doctor.torch_facts"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TORCH_PATIENCE_S, check=False
    )
    if done.returncode:
        return problem(f"cannot be imported: {_reason(done)}", reinstall("torch"))
    return judge_torch(json.loads(done.stdout.splitlines()[-1]))


def judge_torch(facts: dict[str, Any]) -> Finding:
    """Turn the result of :func:`droppeft.doctor.torch_facts.facts` into a finding."""
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU"
    found = f"{facts['version']}, {build} build"
    device = facts["device"]
    if device and device["error"]:
        broken = f"{found}; {device['name']} cannot be used: {device['error']}"
        return problem(broken, "droppeft run accelerator=cpu")
    if device:
        bf16 = "with bf16" if device["bf16"] else "without bf16"
        return ok(f"{found}; {device['name']}, {size(device['memory_bytes'])}, {bf16}")
    if facts["cuda"]:
        reasons = "; ".join(["no CUDA device is found, runs use the CPU", *facts["warnings"]])
        return note(f"{found}; {reasons}", "nvidia-smi")
    if shutil.which("nvidia-smi"):
        # On Linux the package index has the CUDA build under the same version.
        reason = "an NVIDIA driver is installed, which this build cannot use"
        return note(f"{found}; {reason}", reinstall("torch"))
    return ok(f"{found}; no accelerator{' (MPS is not used)' if facts['mps'] else ''}")


def check_processor() -> Finding:
    """Report the cores that this process may use."""
    from droppeft.config import available_cores

    cores = available_cores()
    return ok(f"{cores} cores, {platform.machine()}; a run uses all of them, or threads=N")


def check_memory() -> Finding:
    """Check total and free memory (where the system reports it) within the container's limit."""
    total, free = _memory_bytes()
    found = f"{size(total)}, {'free unknown' if free is None else f'{size(free)} free'}"
    if (total if free is None else free) >= ENOUGH_MEMORY_BYTES:
        return ok(found)
    return note(
        f"{found}: less than {size(ENOUGH_MEMORY_BYTES)} may not be enough",
        "droppeft run training.batch_size=4 evaluation.batch_size=16",
    )


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _memory_bytes() -> tuple[int, int | None]:
    """Total memory, and free memory or ``None`` where the system does not report it."""
    if MEMORY.exists():
        rows = (line.split() for line in MEMORY.read_text(encoding="utf-8").splitlines())
        kilobytes = {row[0].rstrip(":"): int(row[1]) for row in rows}
        total, free = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
        limit = _limit_bytes() or total
        return min(total, limit), min(free, limit)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None


def _limit_bytes() -> int | None:
    text = MEMORY_LIMIT.read_text(encoding="utf-8").strip() if MEMORY_LIMIT.exists() else "max"
    return None if text == "max" else int(text)
