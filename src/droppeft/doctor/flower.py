"""Flower, for its simulation and for clients on other machines; ours.

Neither flwr nor ray is imported: that takes seconds, and only ``federation`` may.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from droppeft.doctor.finding import Finding, note, ok
from droppeft.doctor.packages import installed, reinstall, repair

PARTS = ("flwr", "ray")
COMMANDS = ("flwr", "flower-superlink", "flower-supernode")


def check_flower() -> Finding:
    """The libraries and the commands; a run in one process works without them."""
    lost = [name for name in PARTS if not (installed(name) and importlib.util.find_spec(name))]
    places = {name: _place(name) for name in COMMANDS}
    mute = [f"the command {name}" for name, place in places.items() if place is None]
    if lost or mute:
        found = f"Flower's transports need what is missing: {', '.join([*lost, *mute])}"
        return note(found, repair() if lost else reinstall("flwr"))
    folders = ", ".join(sorted({str(place) for place in places.values()}))
    libraries = ", ".join(f"{name} {installed(name)}" for name in PARTS)
    return ok(f"{libraries}; its commands are in {folders}")


def _place(command: str) -> Path | None:
    """The command's folder; beside this Python comes before the PATH, which may lead elsewhere."""
    beside = shutil.which(command, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(command)
    return Path(found).parent if found else None
