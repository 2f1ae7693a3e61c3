"""Check of Flower, which its simulation and clients on other machines need; ours.

Neither flwr nor ray is imported here, since that takes seconds.
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
    """Check Flower's libraries and commands. A run in one process works without them."""
    libraries = [name for name in PARTS if not (installed(name) and importlib.util.find_spec(name))]
    folders = {name: _folder(name) for name in COMMANDS}
    commands = [f"the command {name}" for name, folder in folders.items() if folder is None]
    if libraries or commands:
        found = f"missing for Flower's transports: {', '.join([*libraries, *commands])}"
        return note(found, repair("[flower]") if libraries else reinstall("flwr", "[flower]"))
    where = ", ".join(sorted({str(folder) for folder in folders.values()}))
    versions = ", ".join(f"{name} {installed(name)}" for name in PARTS)
    return ok(f"{versions}; its commands are in {where}")


def _folder(command: str) -> Path | None:
    """The folder of a command. The folder of this Python comes before those in PATH."""
    beside = shutil.which(command, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(command)
    return Path(found).parent if found else None
