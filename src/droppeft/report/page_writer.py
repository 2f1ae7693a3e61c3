"""A listener that writes the page of a run when it has finished. Ours."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class PageWriter:
    """Writes the page of a run; if that fails it says so, and the run ends as it would without.

    It is told before the listeners that name the page.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def finished(self, result: Mapping[str, Any]) -> None:
        """Write the page."""
        try:
            from droppeft.report.run_page import write_run_page  # not before it is needed

            write_run_page(self._folder)
        except Exception as error:
            print(
                f"droppeft: the page of the run could not be written ({error}); try again with: "
                f"droppeft report {shlex.quote(str(self._folder))}",
                file=sys.stderr,
            )
