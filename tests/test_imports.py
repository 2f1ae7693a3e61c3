"""Imports point down only, and heavy libraries stay where they belong."""

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import droppeft

PACKAGE = Path(droppeft.__file__).parent

# A module may import its own package and whatever stands on a lower level. Neighbours on one
# level do not see each other. The empty name is droppeft/__init__.py.
LEVELS = (
    {"errors", "files", "quantities", "seeds"},
    {"git_lfs", "refusals"},
    {"", "layer_dropout", "table_files"},
    {"config", "extras", "messages"},
    {"checked_safetensors", "data"},
    {"models"},
    {"adapters", "tasks"},
    {"cached_layers"},
    {"training"},
    {"costs", "sharing"},
    {"client", "federated_method"},
    {"bandit", "doctor", "transports"},
    {"methods"},
    {"resources", "runs"},
    {"server"},
    {"comparison"},
    {"command_line_exit", "command_line_settings", "command_line_words", "report"},
    {"flower_server_app", "results", "ui"},
    {"api"},
    {"cost_commands", "federation_commands", "model_commands", "node_commands"},
    {"ui_commands"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

# Files of layer_dropout that need more than torch; importing the package does not import them.
BESIDE_TORCH = {"layer_dropout/trainer.py": {"transformers"}}

# droppeft/__init__.py names what is in api.py for type checkers, and loads it when it is used.
FACADE = ("droppeft", "droppeft.api")

# Libraries that only some packages may import.
OWNERS = {"flwr": {"transports", "flower_server_app"}, "peft": {"adapters"}}

WITHOUT_TORCH = {
    "",
    "errors",
    "files",
    "git_lfs",
    "quantities",
    "refusals",
    "seeds",
    "config",
    "extras",
    "messages",
    "checked_safetensors",
}

MOST_PARAMETERS = 8


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
    if unit not in OWNERS.get(top, {unit}):
        return f"only {' and '.join(sorted(OWNERS[top]))} may"
    if top == "torch" and unit in WITHOUT_TORCH:
        return "this module works without torch"
    if unit == "layer_dropout" and top != "torch" and top not in sys.stdlib_module_names:
        return "layer_dropout needs torch and the standard library alone"
    return None


def _wrong_inside(unit: str, target: str) -> str | None:
    target = target if target in LEVEL else ""  # `from droppeft import __version__`
    if unit == "layer_dropout" and target not in {unit, "errors"}:
        return "layer_dropout can be used without the rest of droppeft"
    if (unit, target) != ("", "api") and target != unit and LEVEL[target] >= LEVEL[unit]:
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


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in FILES:
        parts = file.with_suffix("").parts
        found[".".join(("droppeft", *(part for part in parts if part != "__init__")))] = file
    return found


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which module imports which, wherever in the file it does so."""
    arrows: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = {
            name: name if name in sources else name.rpartition(".")[0]
            for name in imports_of(source)
        }
        arrows[module] = {
            target
            for target in names.values()
            if target in sources and target != module and (module, target) != FACADE
        }
    return arrows


def circles(arrows: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of modules that import each other, directly or over others."""
    sorter = TopologicalSorter({name: sorted(targets) for name, targets in arrows.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        return [tuple(error.args[1])]
    return []


def test_no_modules_import_each_other() -> None:
    """Inside a package too; a package's ``__init__`` that gathers its modules counts as one."""
    sources = {name: (PACKAGE / file).read_text("utf-8") for name, file in modules().items()}
    assert circles(graph(sources)) == []


@pytest.mark.parametrize(
    "sources",
    [
        {"a.one": "from a.two import f", "a.two": "import a.one"},
        {
            "a.one": "import a.two",
            "a.two": "def f():\n    from a import three",
            "a.three": "import a.one",
        },
    ],
)
def test_a_circle_is_noticed(sources: dict[str, str]) -> None:
    assert set(circles(graph(sources))[0]) == set(sources)


def test_no_function_has_many_parameters() -> None:
    long = [
        f"{file}:{node.name}"
        for file in FILES
        for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and _parameters(node) > MOST_PARAMETERS
    ]
    assert long == []


def _parameters(function: ast.FunctionDef) -> int:
    names = [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize(
    ("unit", "source", "expected"),
    [
        ("seeds", "from droppeft.server.rounds import run", "imports point down only"),
        ("methods", "import droppeft.server.rounds as rounds", "imports point down only"),
        ("methods", "from droppeft import server", "imports point down only"),
        ("cached_layers", "from droppeft.training.loop import train", "imports point down only"),
        ("training", "from droppeft.sharing.selection import keep", "imports point down only"),
        ("models", "from droppeft.adapters.attach import attach", "imports point down only"),
        ("messages", "from droppeft.config import Config", "imports point down only"),
        ("server", "from droppeft.cli import main", "imports point down only"),
        ("report", "from droppeft import cli", "imports point down only"),
        ("", "from droppeft.config import Config", "imports point down only"),
        ("data", "def f():\n    from droppeft.methods import METHODS", "imports point down only"),
        ("data", "importlib.import_module('droppeft.cli')", "imports point down only"),
        ("data", "__import__('droppeft.cli')", "imports point down only"),
        ("training", "from . import plans", "relative imports are not used"),
        ("server", "from .rounds import run", "relative imports are not used"),
        ("methods", "import flwr", "only flower_server_app and transports may"),
        ("cli", "from flwr.app import Message", "only flower_server_app and transports may"),
        ("training", "from peft import LoraConfig", "only adapters may"),
        ("messages", "import torch", "without torch"),
        ("seeds", "import torch.nn", "without torch"),
        ("config", "from torch import nn", "without torch"),
        ("errors", "def f():\n    import torch", "without torch"),
        ("checked_safetensors", "import torch", "without torch"),
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
        (
            "cli",
            "from droppeft.report.comparison_page import write\nfrom droppeft.server import rounds",
        ),
        ("transports", "import flwr\nfrom droppeft.transports.flower.records import pack"),
        (
            "methods",
            "from droppeft.sharing import selection\nfrom droppeft.training.loop import train",
        ),
        ("training", "import torch\nfrom droppeft.layer_dropout.gates import gate"),
        ("adapters", "from peft import LoraConfig\nfrom droppeft.messages.tensors import Tensors"),
        ("layer_dropout", "import random\nfrom torch import nn\nimport droppeft.errors"),
        ("cli", "from droppeft import __version__"),
        ("config", "from droppeft.errors import DroppeftError"),
    ],
)
def test_a_downward_import_is_allowed(unit: str, source: str) -> None:
    assert complaints(unit, source) == []
