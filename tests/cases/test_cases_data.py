"""Data files that cause problems in other libraries."""

from pathlib import Path

from droppeft.data.splits import read_file
from refusals import or_refused

STRAY_QUOTES = """\
text,label
fine one,pos
"dull and slow,neg
lovely pace,pos
five feet 6",neg
grim end,neg
happy end,pos
"""


def test_a_stray_quote_joins_no_rows(tmp_path: Path) -> None:
    """Six rows, or an error that names the line or row with the quote."""
    path = tmp_path / "train.csv"
    path.write_text(STRAY_QUOTES)
    with or_refused(r"\b(line 3|row 2)\b"):
        table = read_file(path).table
        assert table["label"].to_pylist() == ["pos", "neg", "pos", "neg", "neg", "pos"]
        assert "lovely pace" in table["text"].to_pylist()
