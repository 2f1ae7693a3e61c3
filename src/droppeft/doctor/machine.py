"""The machine: torch and its accelerator, processor, memory; ours."""

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
"""For a run with the built-in model and data, with room to spare."""

MEMORY = Path("/proc/meminfo")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Of a container; a file that holds ``max`` where there is no limit."""


def check_torch() -> Finding:
    """Import torch in a process of its own and see what it can compute on."""
    # -P: a file torch.py in the current folder is not what a run would import.
    command = [sys.executable, "-P", "-m", "droppeft.doctor.torch_facts"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TORCH_PATIENCE_S, check=False
    )
    if done.returncode:
        return problem(f"cannot be imported: {_why(done)}", reinstall("torch"))
    return judge_torch(json.loads(done.stdout.splitlines()[-1]))


def judge_torch(facts: dict[str, Any]) -> Finding:
    """Tell a person what :func:`droppeft.doctor.torch_facts.facts` says."""
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU"
    found = f"{facts['version']}, {build} build"
    client = facts["client"]
    if client and client["error"]:
        broken = f"{found}; {client['name']} cannot be used: {client['error']}"
        return problem(broken, "droppeft run accelerator=cpu")
    if client:
        bf16 = "with bf16" if client["bf16"] else "without bf16"
        return ok(f"{found}; {client['name']}, {size(client['memory_bytes'])}, {bf16}")
    if facts["cuda"]:
        said = "; ".join(["no CUDA device is seen, runs use the CPU", *facts["warnings"]])
        return note(f"{found}; {said}", "nvidia-smi")
    if shutil.which("nvidia-smi"):
        # Linux's usual package index carries the CUDA build under the same version.
        said = "an NVIDIA driver is here, which this build cannot use"
        return note(f"{found}; {said}", reinstall("torch"))
    return ok(f"{found}; no accelerator{' (MPS is not used)' if facts['mps'] else ''}")


def check_processor() -> Finding:
    """Cores that this process may use."""
    from droppeft.config import available_cores

    cores = available_cores()
    return ok(f"{cores} cores, {platform.machine()}; a run takes all of them, or threads=N")


def check_memory() -> Finding:
    """Memory in all and free, where the system says so, within the container's limit."""
    total, free = _memory_bytes()
    found = f"{size(total)}, {'free unknown' if free is None else f'{size(free)} free'}"
    if (total if free is None else free) >= ENOUGH_MEMORY_BYTES:
        return ok(found)
    return note(
        f"{found}: less than {size(ENOUGH_MEMORY_BYTES)} may not be enough",
        "droppeft run training.batch_size=4 evaluation.batch_size=16",
    )


def _why(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _memory_bytes() -> tuple[int, int | None]:
    """(In all, free or ``None``)."""
    if MEMORY.exists():
        lines = (line.split() for line in MEMORY.read_text(encoding="utf-8").splitlines())
        kilobytes = {words[0].rstrip(":"): int(words[1]) for words in lines}
        total, free = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
        limit = _limit_bytes() or total
        return min(total, limit), min(free, limit)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None


def _limit_bytes() -> int | None:
    text = MEMORY_LIMIT.read_text(encoding="utf-8").strip() if MEMORY_LIMIT.exists() else "max"
    return None if text == "max" else int(text)
