"""The pages of the documentation as Markdown, also those that are notebooks."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def markdown_of(page: Path) -> str:
    """Return the text of a page; cells of code are blocks of Python, without their outputs."""
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    texts = ((cell["cell_type"], "".join(cell["source"])) for cell in cells)
    return "\n\n".join(
        f"```python\n{text}\n```" if kind == "code" else text for kind, text in texts
    )


def python_of(page: str, part: str) -> str:
    """Return the only Python block of a page that contains ``part``."""
    blocks = re.findall(r"```python\n(.*?)```", markdown_of(ROOT / page), re.DOTALL)
    [code] = [block for block in blocks if part in block]
    return str(code)
