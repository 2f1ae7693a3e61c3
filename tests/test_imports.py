"""Imports point down only, and heavy libraries stay where they belong."""

import ast
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

import droppeft

PACKAGE = Path(droppeft.__file__).parent

# A module may import its own package and whatever stands on a lower level. Neighbours on one
# level do not see each other. The empty name is droppeft/__init__.py.
LEVELS = (
    {"", "errors", "files"},
    {"seeds", "config", "plans", "devices"},
    {"layer_dropout", "quantization", "sealed"},
    {"adapters", "models", "data"},
    {"checkpointing", "precision", "offloading"},
    {"memory", "frozen_prefix", "objectives", "gradients"},
    {"sharing", "training"},
    {"costs"},
    {"ledger", "method"},
    {"bandit"},
    {"methods"},
    {"federation", "doctor"},
    {"sizing", "comparison"},
    {"report"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

# Files of layer_dropout that need more than torch; importing the package does not import them.
BESIDE_TORCH = {"layer_dropout/trainer.py": {"transformers"}}

# Libraries that only one package may import.
OWNER = {"flwr": "federation", "peft": "adapters"}

WITHOUT_TORCH = {"", "errors", "files", "seeds", "config", "plans", "devices", "sealed"}


def imports_of(source: str) -> Iterator[str]:
    """Yield the dotted name of everything that is imported, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _is_dynamic(node):
            yield str(node.args[0].value)


def _is_dynamic(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    constant = bool(call.args) and isinstance(call.args[0], ast.Constant)
    return name in {"import_module", "__import__"} and constant


def unit_of(parts: tuple[str, ...]) -> str:
    """The file or folder directly under droppeft that a module belongs to."""
    return parts[0].removesuffix(".py").replace("__init__", "")


def complaints(unit: str, source: str, beside_torch: Collection[str] = ()) -> list[str]:
    """Say what the imports of a file in ``droppeft.<unit>`` do wrong."""
    return [
        f"{unit or 'droppeft'} imports {name}: {wrong}"
        for name in imports_of(source)
        if (wrong := _wrong(unit, name)) and name.partition(".")[0] not in beside_torch
    ]


def _wrong(unit: str, name: str) -> str | None:
    top, _, rest = name.partition(".")
    if not top:
        return "relative imports are not used"
    if top == "droppeft":
        return _wrong_inside(unit, rest.partition(".")[0])
    if OWNER.get(top, unit) != unit:
        return f"only {OWNER[top]} may"
    if top == "torch" and unit in WITHOUT_TORCH:
        return "this module works without torch"
    if unit == "layer_dropout" and top != "torch" and top not in sys.stdlib_module_names:
        return "layer_dropout needs torch and the standard library alone"
    return None


def _wrong_inside(unit: str, target: str) -> str | None:
    target = target if target in LEVEL else ""  # `from droppeft import __version__`
    if unit == "layer_dropout" and target not in {unit, "errors"}:
        return "layer_dropout can be used without the rest of droppeft"
    if target != unit and LEVEL[target] >= LEVEL[unit]:
        return "imports point down only"
    return None


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_keeps_the_arrows(file: Path) -> None:
    source = (PACKAGE / file).read_text(encoding="utf-8")
    allowed = BESIDE_TORCH.get(file.as_posix(), ())
    assert complaints(unit_of(file.parts), source, allowed) == []


def test_every_module_has_a_level() -> None:
    assert {unit_of(file.parts) for file in FILES} <= set(LEVEL)


def test_no_module_has_two_levels() -> None:
    assert sum(map(len, LEVELS)) == len(LEVEL)


@pytest.mark.parametrize(
    ("unit", "source", "expected"),
    [
        ("seeds", "from droppeft.server.rounds import run", "imports point down only"),
        ("methods", "import droppeft.server.rounds as rounds", "imports point down only"),
        ("methods", "from droppeft import federation", "imports point down only"),
        ("sharing", "from droppeft.training.loop import train", "imports point down only"),
        ("training", "from droppeft.sharing.selection import keep", "imports point down only"),
        ("adapters", "from droppeft.models.loading import load", "imports point down only"),
        ("plans", "from droppeft.config import Config", "imports point down only"),
        ("federation", "from droppeft.cli import main", "imports point down only"),
        ("report", "from droppeft import cli", "imports point down only"),
        ("", "from droppeft.errors import DroppeftError", "imports point down only"),
        ("data", "def f():\n    from droppeft.methods import METHODS", "imports point down only"),
        ("data", "importlib.import_module('droppeft.cli')", "imports point down only"),
        ("data", "__import__('droppeft.cli')", "imports point down only"),
        ("training", "from . import plans", "relative imports are not used"),
        ("federation", "from .rounds import run", "relative imports are not used"),
        ("methods", "import flwr", "only federation may"),
        ("cli", "from flwr.app import Message", "only federation may"),
        ("training", "from peft import LoraConfig", "only adapters may"),
        ("plans", "import torch", "without torch"),
        ("seeds", "import torch.nn", "without torch"),
        ("config", "from torch import nn", "without torch"),
        ("errors", "def f():\n    import torch", "without torch"),
        ("devices", "import torch", "without torch"),
        ("layer_dropout", "import numpy as np", "torch and the standard library alone"),
        ("layer_dropout", "from transformers import AutoModel", "the standard library alone"),
        ("layer_dropout", "from droppeft.seeds import seed_for", "without the rest of droppeft"),
        ("layer_dropout", "from droppeft import __version__", "without the rest of droppeft"),
    ],
)
def test_a_forbidden_import_is_noticed(unit: str, source: str, expected: str) -> None:
    [complaint] = complaints(unit, source)
    assert expected in complaint


def test_one_file_of_layer_dropout_may_import_transformers_and_nothing_else() -> None:
    source = "from transformers import TrainerCallback\nimport numpy\nimport droppeft.seeds"
    assert [text.split()[2] for text in complaints("layer_dropout", source, {"transformers"})] == [
        "numpy:",
        "droppeft.seeds:",
    ]


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("cli", "from droppeft.report.page import write\nfrom droppeft.server import rounds"),
        ("federation", "import flwr\nfrom droppeft.transports.flower.records import pack"),
        (
            "methods",
            "from droppeft.sharing import selection\nfrom droppeft.training.loop import train",
        ),
        ("training", "import torch\nfrom droppeft.layer_dropout.gates import gate"),
        ("adapters", "from peft import LoraConfig\nfrom droppeft.messages import Tensors"),
        ("data", "from flwr_datasets.partitioner import DirichletPartitioner"),
        ("layer_dropout", "import random\nfrom torch import nn\nimport droppeft.errors"),
        ("cli", "from droppeft import __version__"),
        ("config", "from droppeft.errors import DroppeftError"),
    ],
)
def test_a_downward_import_is_allowed(unit: str, source: str) -> None:
    assert complaints(unit, source) == []
