"""The pages of runs and of a model, used in a browser without a window."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from browser import Tab, browser_tab
from chats import ANSWERS, chat_settings
from droppeft.config import load_config
from droppeft.runs.folder import locked
from droppeft.server.run import start_run
from runs import Recorder

pytest.importorskip("gradio")
pytestmark = pytest.mark.full


@contextmanager
def served(*arguments: object) -> Iterator[str]:
    """Serve a page by a command, and yield its address; Ctrl-C must end it without a word."""
    command = [sys.executable, "-m", "droppeft", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HTTP_PROXY": "http://127.0.0.1:9"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("http://"):
                break
        else:
            pytest.fail(f"{said}, {process.stderr and process.stderr.read()}")
        yield said[-1].split()[0]
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=120)
        assert (process.returncode, complaints) == (0, "")
    finally:
        process.kill()


@pytest.fixture
def tab() -> Iterator[Tab]:
    with browser_tab() as tab:
        yield tab
        hosts = {urlsplit(address).hostname for address in tab.requests}
        assert hosts - {None, ""} == {"127.0.0.1"}


def test_runs_are_shown_and_new_rounds_and_runs_appear(
    tab: Tab, whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "first"
    shutil.copytree(whole_run, run)
    (run / "result.json").unlink()
    rounds = (run / "rounds.jsonl").read_text()
    (run / "rounds.jsonl").write_text(rounds[: rounds.index("\n") + 30])
    with locked(run), served("ui", tmp_path) as address:
        tab.open(address)
        tab.wait_for_text("round 2 of 3 goes on", "train loss", "first, round 1")
        (run / "rounds.jsonl").write_text(rounds)
        tab.wait_for_text("the final evaluation goes on")
        shutil.copytree(whole_run, tmp_path / "second")
        tab.wait_for("document.querySelectorAll('.ticked input').length == 2")
        tab.click(".ticked input:not(:checked)")
        tab.wait_for_text("finished after 3 rounds")
        tab.wait_for("document.querySelectorAll('.run').length == 2")


def test_a_text_is_classified(tab: Tab, whole_run: Path) -> None:
    with served("serve", whole_run) as address:
        tab.open(address)
        tab.click("button.primary")
        tab.wait_for_text("the text is empty")
        tab.write("textarea", "planet star moon rocket orbit comet")
        tab.click("button.primary")
        tab.wait_for_text("space", "%")


def test_a_language_model_answers(tab: Tab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    learns = ("training.learning_rate=0.02", "training.local_steps=20", "rounds=4")
    overrides = [*chat_settings(tmp_path), *learns, "adapter.targets=all-linear"]
    start_run(load_config(None, overrides), run, Recorder())
    with served("serve", run, "--max-new-tokens", 6) as address:
        tab.open(address)
        ask(tab)
        assert answer(tab) in ANSWERS.values()


def test_a_language_model_answers_with_nothing(tab: Tab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [*chat_settings(tmp_path), "training.learning_rate=0.05", "rounds=1"]
    settings = ("training.local_steps=5", "adapter.targets=all-linear")
    start_run(load_config(None, [*overrides, *settings]), run, Recorder())
    with served("serve", run, "--max-new-tokens", 6) as address:
        tab.open(address)
        ask(tab)
        tab.wait_for_text("The answer is empty.")
        ask(tab)
        tab.wait_for("document.body.innerText.split('The answer is empty.').length == 3")


def ask(tab: Tab) -> None:
    """Send a message in a chat, as soon as the answer before has ended."""
    tab.wait_for("!document.querySelector('textarea').disabled")
    tab.write("textarea", "many answer test")
    tab.press_enter()


def answer(tab: Tab) -> str:
    """The model's first answer in a chat, when it is complete."""
    message = "document.querySelector('.bot [data-testid=bot]')"
    return str(tab.wait_for(f"{message}.innerText.trim()"))
