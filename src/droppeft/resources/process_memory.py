"""Resident memory of this process, and a malloc setting that makes it equal the memory in use.

Source: Linux's /proc (proc(5)) and glibc's mallopt(3).
"""

import ctypes
import platform
import resource
from pathlib import Path

M_MMAP_THRESHOLD = -3
MMAP_FROM_BYTES = 1 << 16
"""Allocations of at least this size get separate pages, which are returned when they are freed."""

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def return_freed_memory() -> None:
    """Make glibc return freed memory to the system at once, from now on; elsewhere do nothing.

    By default glibc keeps freed blocks of up to 32 MiB in one heap, which torch's tensors of many
    sizes fragment: after a while a training process has up to twice the memory that is in use.
    Separate pages for each allocation are slower, since the system has to clear them.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_FROM_BYTES)


def resident_bytes() -> int:
    """Resident memory now; the peak where the system does not report the present value."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident memory since the last :func:`reset_peak`, or since the process started."""
    peak = _status("VmHWM")
    if peak is None:
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak


def reset_peak() -> bool:
    """Reset the peak to what is resident now; ``False`` where the system cannot do that."""
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
    values = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(values[0]) * 1024 if values else None
