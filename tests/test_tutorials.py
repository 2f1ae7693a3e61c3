"""The tutorials are notebooks: their outputs are fit to be shown, and they run."""

import ast
import base64
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import droppeft
from droppeft.config import known_keys
from flower_example import example
from pages import ROOT, markdown_of

NOTEBOOKS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))

SMALL: dict[str, dict[str, Any]] = {
    "classify_a_table": {"ROWS": 400, "ROUNDS": 1},
    "compare_methods": {"ROWS": 400, "ROUNDS": 1, "SEEDS": [0]},
    "fine_tune_a_language_model": {"ROUNDS": 1, "TEST_ROWS": 4, "GENERATED": 2},
    "layer_dropout_in_trainer": {"STEPS": 2, "SFT_STEPS": 2, "TEST_ROWS": 16},
    "your_own_machines": {"ROUNDS": 1},
}
"""For each notebook, values of its cell of sizes with which it runs in a minute or two."""

LARGEST_IMAGE = 100_000  # bytes


def test_every_tutorial_has_a_small_form() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)


def code_cells(notebook: Path) -> Iterator[Any]:
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            yield cell


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_one_execution_without_errors(notebook: Path) -> None:
    cells = list(code_cells(notebook))
    kinds = [cell["metadata"].get("tags", []) for cell in cells]
    assert kinds.count(["parameters"]) == 1
    counts = [
        cell["execution_count"]
        for cell, tags in zip(cells, kinds, strict=True)
        if "skip-execution" not in tags
    ]
    assert counts == [*range(1, len(counts) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len(outputs) > 5
    assert {output["output_type"] for output in outputs} <= {
        *("stream", "display_data", "execute_result")
    }


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_small_and_do_not_name_a_machine(notebook: Path) -> None:
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            image = output.get("data", {}).pop("image/png", "")
            assert len(base64.b64decode(image)) < LARGEST_IMAGE
            text = json.dumps(output)
            assert "\\u001b" not in text
            assert not re.search(r"/(root|tmp|work|var|Users|home/(?!me/))\b", text), text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_settings_of_runs_in_python_exist(notebook: Path) -> None:
    known = {key for key, _ in known_keys()} | {*inspect.signature(droppeft.run).parameters}
    found: set[str] = set()
    for block in re.findall(r"```python\n(.*?)```", markdown_of(notebook), re.DOTALL):
        lines = (line for line in block.splitlines() if not re.match(r"\s*[!%]", line))
        found |= set(_settings_of_runs("\n".join(lines)))
    assert found <= known


def _settings_of_runs(code: str) -> Iterator[str]:
    """The names of the settings of ``droppeft.run``; those of a table as ``table.name``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "droppeft.run":
            for given in node.keywords:
                if isinstance(given.value, ast.Dict):
                    for key in given.value.keys:
                        yield f"{given.arg}.{ast.literal_eval(key)}" if key else ""
                else:
                    yield given.arg or ""


@pytest.mark.full
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_runs(notebook: Path, tmp_path: Path) -> None:
    """In its small form; an error of a cell is an error here."""
    from scripts.run_tutorials import executed

    sizes = dict(SMALL[notebook.stem])
    if notebook.stem == "your_own_machines":
        sizes["PORT"], *sizes["NODE_PORTS"] = example.free_ports(4)
    executed(notebook, tmp_path, sizes, timeout_s=1200)
