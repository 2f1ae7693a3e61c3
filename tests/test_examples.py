"""The examples run, and the code and commands in the README and the pages are valid."""

import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import droppeft
from droppeft.cli import app
from droppeft.command_line_words import file_and_settings
from droppeft.config import as_tree, build_config, flat, known_keys, load_config
from droppeft.data.conversation_sources import load_conversations
from droppeft.data.conversations import Conversation
from droppeft.layer_dropout import find_blocks
from droppeft.methods import METHODS
from droppeft.methods.rules import check_settings
from droppeft.server.run import start_run
from pages import markdown_of, python_of
from runs import Recorder, write_tiny_data
from tiny import tiny_model

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.is_file())


def test_every_example_has_a_test() -> None:
    """`flower_on_loopback.py` runs in transports/flower/test_sites_over_superlink.py."""
    assert EXAMPLES == [
        "ag_news.toml",
        "flower_on_loopback.py",
        "layer_dropout_alone.py",
        "own_method.py",
        "smollm2.toml",
        "summarise_docstrings.py",
        "summarise_docstrings.toml",
    ]


def test_layer_dropout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    program = runpy.run_path(str(ROOT / "examples/layer_dropout_alone.py"))
    program["main"].__globals__["STEPS"] = 3
    program["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("layers 3 of 6") for line in lines)


def test_own_method(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two clients the median is the mean; resumed and exported, it is known by its name."""
    method = runpy.run_path(str(ROOT / "examples/own_method.py"))["MEDIAN"]
    monkeypatch.setitem(METHODS, "median", method)  # is removed when the test ends
    shown = python_of("docs/how_to/write_a_method.md", "MEDIAN = Method(")
    assert shown.strip() in (ROOT / "examples/own_method.py").read_text("utf-8")
    model, data = (word.partition("=")[2] for word in tiny_overrides[:2])
    settings: dict[str, Any] = {
        "model": model,
        "data": data,
        "progress": False,
        "rounds": 2,
        "clients": 4,
        "cohort_size": 2,
        "threads": 1,
        "accelerator": "cpu",
        "training": {"local_epochs": 2, "learning_rate": 0.02},
        "partition": {"kind": "iid"},
    }
    own = droppeft.run(method=method, out=tmp_path / "own", **settings)
    plain = droppeft.run(method="fedlora", out=tmp_path / "plain", **settings)
    assert own.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=0.01)
    assert own.metrics["loss"] < own.metrics["initial_loss"]
    assert own.predict("bread soup") in ("food", "music", "space")


def test_summaries_of_docstrings(tmp_path: Path) -> None:
    """Of the smallest library. The rows are read by the settings that stand beside the program."""
    program = runpy.run_path(str(ROOT / "examples/summarise_docstrings.py"))
    program["main"].__globals__["LIBRARIES"] = ("joblib", "not_installed")
    program["main"](tmp_path)
    config = load_config(ROOT / "examples/summarise_docstrings.toml", [f"data={tmp_path}"])
    check_settings(config)
    found = load_conversations(config.data, config.source, config.partition.key)
    assert len(found.test) == 25
    assert len(found.train) > 10
    for row in found.train.rows:
        assert isinstance(row, Conversation)
        [prompt, completion] = row.messages
        assert prompt.content.startswith(program["PROMPT"])
        assert "\n" not in completion.content
    assert all(key.startswith("joblib/") for key in found.train.keys)


@pytest.mark.full
def test_ag_news(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer rounds, clients, steps and texts."""
    monkeypatch.setenv("DROPPEFT_DATA", str(data_folder))
    overrides = [
        "rounds=1",
        "clients=4",
        "cohort_size=2",
        "training.local_steps=2",
        "training.batch_size=4",
    ]
    limits = ["source.max_train_rows=400", "source.max_test_rows=40", "training.max_length=32"]
    config = load_config(ROOT / "examples/ag_news.toml", [*overrides, *limits])
    result = start_run(config, tmp_path / "run", Recorder())
    assert result["mean_active_layers"] == 4.0
    assert (result["classes"], result["test_rows"]) == (4, 40)


def commands() -> list[str]:
    """Return the commands `droppeft ...` of the README and the pages, each once.

    They stand in blocks without a language, and after "!" in cells of notebooks.
    """
    found: set[str] = set()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.*"))):
        # Decisions say what was valid when they were made; the other page adds a method.
        if page.suffix not in (".md", ".ipynb") or page.name == "write_a_method.md":
            continue
        if page.parent.name != "decisions":
            text = markdown_of(page).replace("\\\n", "")
            blocks = re.findall(r"^ *```(.*?)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
            lines = "\n".join(code for language, code in blocks if not language).splitlines()
            lines += re.findall(r"^ *!(.*)", text, re.MULTILINE)
            found |= {line.partition(" #")[0].strip() for line in lines}
    return sorted(line for line in found if line.startswith("droppeft "))


COMMANDS = commands()
RUNS = [line for line in COMMANDS if re.match(r"droppeft run( (?!.*\.\.\.)|$)", line)]


def test_the_pages_have_commands() -> None:
    assert len(RUNS) > 30
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("command", RUNS)
def test_a_command_is_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.partition(" --")[0])[2:]
    path, overrides = file_and_settings(words)
    if path == Path("my.toml"):  # shown on the page of settings
        overrides = ["method=droppeft", *overrides]
    check_settings(load_config(path if path and path.exists() else None, overrides))


@pytest.mark.parametrize("command", [line for line in COMMANDS if "..." not in line])
def test_a_command_has_these_options(command: str) -> None:
    """It is parsed and not run."""
    found = typer.main.get_command(app)
    name, *words = shlex.split(command)[1:]
    while isinstance(found, click.Group):
        found = found.commands[name]
        if isinstance(found, click.Group):
            name, *words = words
    found.make_context(name, words)


def test_the_configuration_for_those_who_come_from_flowertune_is_valid() -> None:
    """The settings that the tables name exist, and those of the file have the tables' values."""
    page = (ROOT / "docs/how_to/come_from_flowertune.md").read_text(encoding="utf-8")
    [toml] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    config = build_config(tomllib.loads(toml))
    check_settings(config)
    tables = page.partition("## Settings")[2].partition("## Files")[0]
    cells = re.findall(r"^\|[^|]*\|(.*)\|$", tables, re.MULTILINE)
    named = re.findall(r"`([a-z_.]+) = ([^`]+)`", "\n".join(cells))
    assert len(named) > 15
    given = flat(as_tree(config))
    for key, value in named:
        if key not in ("training.local_epochs", "threads"):  # alternatives, and what is not there
            assert given[key] == tomllib.loads(f"value = {value}")["value"], key
    assert {key for key, _ in named} <= {key for key, _ in known_keys()}


@pytest.mark.full
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_data(tmp_path)
    (tmp_path / "train.csv").rename("news.csv")
    found: dict[str, Any] = {}
    code = python_of("README.md", "droppeft.run").replace("rounds=10", "rounds=1")
    exec(code.replace("clients=10", "clients=5"), found)
    assert found["result"].conclusion
    assert (tmp_path / "my-model" / "config.json").is_file()


TUTORIAL = "docs/tutorials/layer_dropout_in_trainer.ipynb"


@pytest.mark.parametrize(
    ("page", "part", "noun"),
    [
        (TUTORIAL, "layer_dropout(model", "dropout"),
        (TUTORIAL, "gated(blocks)", "gates"),
    ],
)
def test_the_loops_of_a_page_run(page: str, part: str, noun: str) -> None:
    import torch

    model = tiny_model(4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batches = [{"input_ids": ids, "labels": torch.tensor([0, 1])}] * 3
    before = [value.detach().clone() for value in model.classifier.parameters()]
    names = {"model": model, "optimizer": optimizer, "batches": batches}
    exec(python_of(page, part), names)
    assert sum(names[noun].executed) == 3 * 2  # half of four layers
    assert not any(map(torch.equal, before, model.classifier.parameters()))
    assert all("forward" not in vars(block) for block in find_blocks(model)[1])
