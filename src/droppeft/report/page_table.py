"""A table of texts, for pages. Ours."""

from collections.abc import Sequence
from dataclasses import dataclass

UNKNOWN = "–"
"""A value that is not known, or that does not exist."""


@dataclass(frozen=True)
class PageTable:
    """A table of texts.

    Attributes:
        head: names of the columns.
        rows: the cells of each row.
    """

    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def known(self) -> "PageTable":
        """Return the table without columns that are empty or unknown in every row."""
        kept = [
            place
            for place in range(len(self.head))
            if any(row[place] not in ("", UNKNOWN) for row in self.rows)
        ]
        rows = [[row[place] for place in kept] for row in self.rows]
        return PageTable([self.head[place] for place in kept], rows)
