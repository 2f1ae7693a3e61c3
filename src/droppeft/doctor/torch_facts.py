"""Print as JSON what torch reports about this machine; run in a separate process.

Ours. A torch built for another processor or driver can end the process that imports it.
"""

import json
import warnings
from typing import Any


def facts() -> dict[str, Any]:
    """Version, build, and the device that ``accelerator=auto`` would use."""
    with warnings.catch_warnings(record=True) as caught:  # they say why torch finds no device
        warnings.simplefilter("always")
        import torch

        device = _device(torch) if torch.cuda.is_available() else None
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "mps": torch.backends.mps.is_available(),
        "device": device,
        "warnings": [" ".join(str(warning.message).split()) for warning in caught],
    }


def _device(torch: Any) -> dict[str, Any]:
    about = {
        "name": torch.cuda.get_device_name(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "error": None,
    }
    try:  # a device that is too old for this build fails only when it computes
        torch.ones(1, device="cuda").sum().item()
    except RuntimeError as error:
        about["error"] = " ".join(str(error).split())
    return about


if __name__ == "__main__":
    print(json.dumps(facts()))
