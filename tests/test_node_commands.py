"""The commands ``droppeft node ...``: what a site sees before it joins a federation."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from droppeft.cli import app
from droppeft.client.client_state import client_folder, save_tensors
from droppeft.errors import DroppeftError
from refusals import assert_one_sentence
from runs import TOPICS


def droppeft(*words: object) -> Result:
    """Run ``droppeft node ...``; an error that is not a user's mistake is raised."""
    result = CliRunner().invoke(app, ["node", *map(str, words)], env={"COLUMNS": "120"})
    if result.exception and not isinstance(result.exception, SystemExit | DroppeftError):
        raise result.exception
    return result


def mistake(*words: object) -> str:
    error = droppeft(*words).exception
    assert isinstance(error, DroppeftError)
    assert_one_sentence(error)
    return str(error)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The node file of a site that lacks a class and has a label of its own."""
    rows = [
        f"{word} {number},{name}"
        for name in ("food", "space")
        for number, word in enumerate(TOPICS[name] * 3)
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["message,kind", *rows, "rain,weather", ""]))
    node = tmp_path / "node.toml"
    tables = '[source]\nlabel = "kind"\n[send]\nhead = false\n'
    node.write_text(f'client = 7\ndata = "rows.csv"\n{tables}')
    return node


def test_a_site_is_checked_against_a_published_task(
    site: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    task = tmp_path / "task.json"
    of_model = [one for one in tiny_overrides if one.startswith(("model=", "data="))]
    published = droppeft("task", *of_model, "partition.kind=sites", "clients=3", "--out", task)
    assert published.output.endswith("task=classification with 3 classes; give it to the sites\n")
    assert json.loads(task.read_text())["label_names"] == ["food", "music", "space"]
    assert "exists already" in mistake("task", "--out", task)
    assert "set partition.kind=sites" in mistake("task", *of_model, "--out", tmp_path / "x.json")

    with site.open("a") as file:
        file.write("[split]\nmin_rows = 36\n")
    model = of_model[0].removeprefix("model=")
    site.write_text(f'model = "{model}"\n{site.read_text()}')
    result = droppeft("check", site, "--task", task)
    shown = " ".join(result.output.split())
    assert result.exit_code == 0
    for part in (
        "client 7 · for classification of texts",
        "text ← message, label ← kind",
        "37 read; 28 to train, 4 to validate, 4 to test",
        "food 14 2 2",
        "music 0 0 0",
        "weather: row 37 of",
        "the same as the server's",
        "takes part yes",
        "not of the head (send.head=false)",
    ):
        assert part in shown
    site.write_text(site.read_text().replace("36", "37"))
    refused = droppeft("check", site, "--task", task)
    assert refused.exit_code == 1
    assert "no: it has fewer rows of this task than" in " ".join(refused.output.split())
    assert "is no published task" in mistake("check", site, "--task", site)


def test_a_site_is_checked_without_a_task(site: Path) -> None:
    shown = " ".join(droppeft("check", site).output.split())
    assert "classes 3, in their order" in shown
    assert "not checked, since the node file names none" in shown
    site.write_text("client = 1\ndata = 'rows.csv'\nsteps = 5\n")
    assert "steps" in mistake("check", site)
    site.write_text("client = 1\ndata = 'none.csv'\n")
    assert "none.csv: no such file" in mistake("check", site)


def test_what_runs_have_saved_is_listed_and_deleted(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path / "cache"))
    assert "no run has saved anything" in droppeft("state").output
    for run in ("aa11", "bb22"):
        save_tensors(client_folder(run, 3), 1, None, {0: {"a": np.ones(1000, np.float32)}})
    listed = droppeft("state").output
    assert re.search(r"aa11 +1 +4\.\d kB +0 B", listed)
    CliRunner().invoke(app, ["node", "state", "--delete", "aa11"], input="n\n")
    assert (state / "aa11").is_dir()
    deleted = droppeft("state", "--delete", "aa11", "--yes")
    assert deleted.output == "deleted what run aa11 had saved\n"
    assert [path.name for path in state.iterdir()] == ["bb22"]
    assert "run ../x has saved nothing" in mistake("state", "--delete", "../x", "--yes")
