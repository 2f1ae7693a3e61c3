"""Resident memory of this process, and how malloc is kept from hiding it.

Source: Linux' /proc (proc(5)) and glibc's mallopt(3).
"""

import ctypes
import platform
import resource
from pathlib import Path

M_MMAP_THRESHOLD = -3
GIVEN_BACK_FROM = 1 << 16
"""Bytes from which an allocation gets pages of its own, which go back when it is freed."""

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def give_memory_back() -> None:
    """Let glibc return what is freed to the system at once, from now on; elsewhere do nothing.

    By default glibc keeps freed blocks of up to 32 MiB in one heap, which torch's tensors of many
    sizes leave full of holes: a training process then has up to twice the memory that is in use,
    and the more the longer it runs. Pages of their own are slower, since the system clears them.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, GIVEN_BACK_FROM)


def resident_bytes() -> int:
    """Resident now; the most there was where the system does not say."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Most that was resident since the last :func:`forget_peak`, or since the start."""
    found = _status("VmHWM")
    if found is None:
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


def forget_peak() -> bool:
    """Start anew from what is resident; ``False`` where the system has no way to do that."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None
