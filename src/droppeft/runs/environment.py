"""Where a result was made: versions and machine, as every result file carries them."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from droppeft.config import available_cores

PACKAGES = (
    "droppeft",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "flwr-datasets",
    "numpy",
    "scikit-learn",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def machine(accelerator: str) -> dict[str, str | int]:
    """Cores, memory, processor, accelerator and torch's thread count."""
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
