"""Read tables from files: delimited text, JSON, Parquet and Arrow. Ours.

No format guesses what a text means: a field of a CSV file stays as it is written (``007``, ``NA``,
``2024-01-31``), and what a column holds is decided where it is used.
"""

from droppeft.table_files.formats import (
    SPREADSHEETS,
    SUFFIXES,
    TableFile,
    columns_of,
    is_table_file,
    read_table,
    stem_of,
)

__all__ = [
    "SPREADSHEETS",
    "SUFFIXES",
    "TableFile",
    "columns_of",
    "is_table_file",
    "read_table",
    "stem_of",
]
