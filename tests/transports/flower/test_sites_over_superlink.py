"""Three sites on a SuperLink with TLS and keys: the run in one process, and no text of theirs."""

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from chats import chat_settings
from droppeft.config import load_config
from droppeft.server.run import start_run
from flower_example import EXAMPLE, example
from runs import Recorder, outcome

CANARY = "qwertzuiop"
"""First word of every text of a site, with the number of its client."""

TOO_SMALL = "it has fewer rows of this task than the 20 that it takes part with"


def copied_sites(folder: Path) -> list[Path]:
    """Copy the sites of the example (client 2 is too small); begin each text with a word."""
    shutil.copytree(EXAMPLE.parent / "sites", folder)
    nodes = sorted(folder.glob("*/node.toml"), key=lambda node: node.read_text())
    for client, node in enumerate(nodes):
        assert node.read_text().startswith(f"client = {client}\n")
        [table] = node.parent.glob("*.csv")
        column = 1 if table.name == "export.csv" else 0
        lines = [line.split(",", column) for line in table.read_text().splitlines()]
        marked = [
            [*line[:-1], re.sub(r'^"?', rf"\g<0>{CANARY}{client} ", line[-1])] for line in lines[1:]
        ]
        table.write_text("\n".join(",".join(line) for line in (lines[0], *marked)) + "\n")
    return nodes


def in_process(words: Sequence[str], sites: Sequence[Path], out: Path) -> dict[str, Any]:
    names = f"sites={','.join(map(str, sites))}"
    start_run(load_config(None, [*words, names]), out, Recorder())
    return comparable(out)


def comparable(out: Path) -> dict[str, Any]:
    """What a run writes, without what may differ: where its clients are."""
    found = outcome(out)
    del found["config"]
    for name in ("transport", "flower", "sites"):
        found["result"]["config"].pop(name, None)
    return found


def kill_the_run(submitted: "subprocess.Popen[bytes]", federation: Any, out: Path) -> None:
    """Kill the process of a run after its first round."""
    while not list((out / "checkpoints").glob("*1.safetensors")):
        assert submitted.poll() is None
        time.sleep(0.1)
    server = psutil.Process(federation.processes["superexec"].pid)
    for process in server.children(recursive=True):
        process.kill()
    submitted.kill()
    submitted.wait()


def files_with(text: str, *folders: Path) -> set[Path]:
    """Files that contain a text."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path for path in paths if text.encode() in path.read_bytes()}


@pytest.mark.full  # minutes: Flower starts a process for every message
def test_sites_on_a_superlink_are_the_run_in_process_also_after_a_kill(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = copied_sites(tmp_path / "sites")
    model = next(word for word in tiny_overrides if word.startswith("model="))
    for site in sites:
        site.write_text(f"model = {model.partition('=')[2]!r}\n{site.read_text()}")
    words = [
        *(model, f"data={tmp_path / 'sites' / 'server'}", "cohort_size=3", "rounds=3"),
        *("method=droppeft", "sharing.fraction=0.5", "sharing.criterion=cka", "threads=1"),
        *("training.local_steps=2", "training.batch_size=4", "accelerator=cpu"),
    ]
    monkeypatch.setenv("DROPPEFT_STATE", str(tmp_path / "state here"))
    expected = in_process(words, sites, tmp_path / "here")
    monkeypatch.setenv("DROPPEFT_STATE", str(tmp_path / "state there"))
    out = tmp_path / "there"
    with example.loopback(tmp_path / "flower", sites) as federation:
        kill_the_run(federation.submit(words, out), federation, out)
        federation.run([], out)
    assert comparable(out) == expected
    assert {
        (failure["client"], failure["reason"])
        for row in expected["rounds"]
        for failure in row["failures"]
    } == {(2, TOO_SMALL)}
    logs = Path(tempfile.gettempdir())
    for client, site in enumerate(sites):
        [table] = site.parent.glob("*.csv")
        found = files_with(f"{CANARY}{client}", tmp_path, *logs.glob("droppeft-*"))
        assert found == {table}


@pytest.mark.full
def test_a_language_model_of_sites_on_a_superlink_is_the_run_in_process(tmp_path: Path) -> None:
    """Each client's own model also writes texts, on its node."""
    left_out = ("clients=", "partition.", "data=")
    given = chat_settings(tmp_path)
    model = next(word for word in given if word.startswith("model=")).partition("=")[2]
    [train] = tmp_path.rglob("train.jsonl")
    lines, sites = train.read_text().splitlines(keepends=True), []
    for client in (0, 1):
        folder = tmp_path / f"site {client}"
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(lines[client::2]))
        sites.append(folder / "node.toml")
        content = f'client = {client}\ndata = "rows.jsonl"\nmodel = "{model}"\nthreads = 1\n'
        sites[-1].write_text(content)
    words = [
        *(word for word in given if not word.startswith(left_out)),
        *(f"data={train.parent / 'test.jsonl'}", "evaluation.personalised_generated=4"),
    ]
    expected = in_process(words, sites, tmp_path / "here")
    with example.loopback(tmp_path / "flower", sites) as federation:
        federation.run(words, tmp_path / "there")
    assert comparable(tmp_path / "there") == expected
    generated = [(tmp_path / place / "generated.jsonl").read_bytes() for place in ("here", "there")]
    assert generated[0] == generated[1]
