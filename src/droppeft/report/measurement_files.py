"""The files of ``--out`` of the commands that measure: the result as JSON, and a figure. Ours."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from droppeft.errors import DroppeftError
from droppeft.files import write_atomically


def write_measurement(
    result: Mapping[str, Any], folder: Path, name: str, draw: Callable[[Path], None]
) -> None:
    """Write the JSON, and the figure as PNG and SVG, into a new or existing folder.

    Args:
        name: of the files, without their endings.
        draw: writes the figure to a path without its endings.

    Raises:
        DroppeftError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
        draw(folder / name)
    except OSError as error:
        raise DroppeftError(f"--out {folder}: cannot be written ({error})") from None
