"""The versions and the machine with which a result was made, for the result file."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from droppeft import __version__
from droppeft.config import available_cores

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "numpy",
    "scikit-learn",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on.

    droppeft itself may run from a folder with its source, without being installed.
    """
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "droppeft": __version__, **packages}


def machine(accelerator: str) -> dict[str, str | int]:
    """Processor, cores, memory, accelerator, and torch's number of threads."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = torch.cuda.get_device_name() if accelerator == "cuda" else "none"
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": available_cores(),
        "memory_bytes": memory,
        "accelerator": name,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
