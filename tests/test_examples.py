"""The examples run, and the code and commands in the README and the pages are valid."""

import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

import droppeft
from droppeft.command_line_words import file_and_settings
from droppeft.config import as_tree, build_config, flat, known_keys, load_config
from droppeft.data.conversation_sources import load_conversations
from droppeft.data.conversations import Conversation
from droppeft.layer_dropout import find_blocks
from droppeft.methods import METHODS
from droppeft.methods.rules import check_settings
from droppeft.models.packaged import builtin_model_folder
from droppeft.server.run import start_run
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
    shown = code_of("docs/how_to/write_a_method.md", "MEDIAN = Method(")
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


def test_the_python_of_the_tutorial_runs(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tiny model and few steps; the second block is for the model that was exported."""
    page, names = "docs/tutorials/classify_a_table.md", {}
    monkeypatch.chdir(tmp_path)
    lines = [f"text {row} about {row % 4},{'abcd'[row % 4]}" for row in range(400)]
    Path("news.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    model = tiny_overrides[0].partition("=")[2]
    quick = f'"news.csv", model={model!r}, training={{"local_steps": 1}},'
    exec(code_of(page, "droppeft.run").replace('"news.csv",', quick), names)
    names["result"].export("news-model", merge=True)
    exec(code_of(page, "pipeline("), names)
    assert names["classify"]("text 1 about 1")[0]["label"] in "abcd"


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
    """Return the `droppeft run` commands of the README and the pages, each once."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(
        page.read_text(encoding="utf-8").replace("\\\n", "")
        for page in pages
        # Decisions say what was valid when they were made; the other page adds a method.
        if page.parent.name != "decisions" and page.name != "write_a_method.md"
    )
    found = (re.split(r" #| --", line)[0].strip() for line in text.splitlines())
    runs = {line for line in found if re.match(r"droppeft run( |$)", line)}
    return sorted(line for line in runs if not line.endswith("..."))


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 30


@pytest.mark.parametrize("command", commands())
def test_a_command_is_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path, overrides = file_and_settings(shlex.split(command)[2:])
    if path == Path("my.toml"):  # shown on the page of settings
        overrides = ["method=droppeft", *overrides]
    check_settings(load_config(path if path and path.exists() else None, overrides))


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


def code_of(page: str, part: str) -> str:
    """Return the only Python block of a page that contains ``part``."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    [code] = [block for block in blocks if part in block]
    return str(code)


@pytest.mark.full
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_data(tmp_path)
    (tmp_path / "train.csv").rename("news.csv")
    found: dict[str, Any] = {}
    code = code_of("README.md", "droppeft.run").replace("rounds=10", "rounds=1")
    exec(code.replace("clients=10", "clients=5"), found)
    assert found["result"].conclusion
    assert (tmp_path / "my-model" / "config.json").is_file()


TUTORIAL = "docs/tutorials/layer_dropout_in_trainer.md"


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
    exec(code_of(page, part), names)
    assert sum(names[noun].executed) == 3 * 2  # half of four layers
    assert not any(map(torch.equal, before, model.classifier.parameters()))
    assert all("forward" not in vars(block) for block in find_blocks(model)[1])


@pytest.mark.full
def test_the_trainer_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the built-in model instead of that of the Hub, fewer steps and fewer rows."""
    monkeypatch.chdir(tmp_path)
    lines = [f"text {row} about {row % 4},{'abcd'[row % 4]}" for row in range(320)]
    Path("news.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    code = code_of(TUTORIAL, "callbacks=[LayerDropoutCallback")
    replaced = {
        '"sentence-transformers/all-MiniLM-L6-v2"': repr(str(builtin_model_folder())),
        "max_steps=100,": "max_steps=4, use_cpu=True,",
        "logging_steps=20": "logging_steps=1",
        "eval_steps=50": "eval_steps=4",
    }
    for old, new in replaced.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    history = names["trainer"].state.log_history
    assert [row["active_layers"] for row in history if "loss" in row] == [3.0] * 4
    assert all("forward" not in vars(block) for block in find_blocks(names["model"])[1])
