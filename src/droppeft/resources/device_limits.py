"""Limits of a device's memory and time, as options of the command line give them. Ours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from droppeft.config import DeviceProfile
from droppeft.costs.device_profiles import profile_named
from droppeft.errors import DroppeftError

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Limits:
    """Limits of a device.

    Attributes:
        memory_bytes: memory of the whole training process.
        step_s: longest time of a step in seconds, or ``None`` for no limit.
        profile: the device profile whose time is modelled, or ``None``.
    """

    memory_bytes: float
    step_s: float | None
    profile: DeviceProfile | None


def limits(
    memory: str | None,
    step_s: float | None,
    profile: str | None,
    custom: Mapping[str, DeviceProfile],
) -> Limits:
    """Read limits from the options of the command line.

    Args:
        memory: a size; ``None`` for the memory of the device profile.
        step_s: longest time of a step in seconds; ``None`` for no limit.
        profile: name of a device profile, or ``None``.
        custom: profiles that the configuration defines.

    Raises:
        DroppeftError: there is neither memory nor profile, a time limit has no profile, or the
            profile is unknown.
    """
    known = profile_named(profile, custom) if profile is not None else None
    if step_s is not None and profile is None:
        raise DroppeftError("--seconds needs --profile, which says how fast the device is")
    if memory is not None:
        return Limits(parse_bytes(memory), step_s, known)
    if known is None:
        raise DroppeftError(
            "the device's memory is unknown; give --memory 8GB or --profile jetson_tx2"
        )
    return Limits(known.memory_bytes, step_s, known)


def parse_bytes(text: str) -> int:
    """Read a memory size such as ``8GB`` or ``7.5 GiB``.

    Raises:
        DroppeftError: the text is not a memory size, or it has no unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS or float(match[1]) == 0:
        raise DroppeftError(
            f"--memory {text!r} is not a memory size; write it with its unit, as 8GB, 7.5GiB or "
            "512MB"
        )
    return int(float(match[1]) * UNITS[match[2].lower()])
