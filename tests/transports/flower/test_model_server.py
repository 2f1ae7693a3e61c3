"""The model server: one process for all messages, which ends when it is not needed."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from droppeft.client.site_config import published_settings
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply, Update
from droppeft.refusals import Refused
from droppeft.server.prepare import Prepared
from droppeft.transports.flower import model_server
from droppeft.transports.flower.wire_format import RunContext, pack_instruction, unpack_reply
from runs import published_for

MOST = 10**8


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the sockets of this test, with a short path: a socket's may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="d") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        sockets = Path(short) / f"droppeft-{os.getuid()}"
        yield sockets
        for process in model_servers(sockets):
            process.kill()
            process.wait()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for the SuperNode."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        yield process
        process.kill()


@pytest.fixture
def run_context(prepared: Prepared) -> RunContext:
    settings = published_settings(prepared.config)
    return RunContext(settings, published_for(prepared), model_server=True)


@pytest.fixture
def node_file(prepared: Prepared, tmp_path: Path) -> Path:
    """The file of a site that is client 0."""
    path = tmp_path / "node.toml"
    config = prepared.config
    path.write_text(f"client = 0\ndata = {config.data!r}\nmodel = {config.model!r}\n")
    return path


Ask = Callable[..., Reply]


@pytest.fixture
def ask(instructions: list[Instruction], run_context: RunContext, node_file: Path) -> Ask:
    """Have the first instruction run by a node's model server."""

    def run(node_id: int = 7) -> Reply:
        packed = pack_instruction(instructions[0], run_context)
        return unpack_reply(model_server.ask(packed, node_id, str(node_file)), MOST)

    return run


def model_servers(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in process.info["cmdline"] or [])
    ]


def becomes_true(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.full
def test_one_process_answers_all_and_ends_with_its_supernode(
    ask: Ask, folder: Path, watched: subprocess.Popen[bytes]
) -> None:
    first = ask()
    [process] = model_servers(folder)
    opened = process.io_counters().read_chars
    second = ask()
    assert isinstance(first, Update)
    assert isinstance(second, Update)
    assert first.train_loss == second.train_loss
    # A model and a tokenizer have megabytes; an instruction has kilobytes.
    assert process.io_counters().read_chars - opened < 300_000 < opened
    watched.kill()
    watched.wait()
    assert becomes_true(lambda: not model_servers(folder))
    assert [path.name for path in folder.iterdir()] == ["lock"]


@pytest.mark.full
def test_after_one_has_died_another_is_started(
    ask: Ask, folder: Path, watched: subprocess.Popen[bytes]
) -> None:
    assert isinstance(ask(), Update)
    [process] = model_servers(folder)
    process.kill()
    process.wait()
    assert isinstance(ask(), Update)  # although the socket of the old one still exists
    assert isinstance(ask(node_id=8), Update)
    assert len(model_servers(folder)) == 2  # one for each node


@pytest.mark.full
@pytest.mark.parametrize("times", [1, 2])
def test_an_instruction_is_run_again_if_its_process_is_killed_but_once(
    ask: Ask, folder: Path, watched: subprocess.Popen[bytes], times: int
) -> None:
    ask()
    killed: set[int] = set()

    def kill() -> None:
        while len(killed) < times:
            for process in model_servers(folder):
                if process.pid not in killed:
                    process.suspend()
                    time.sleep(1.0)
                    process.kill()
                    killed.add(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    if times == 1:
        assert isinstance(ask(), Update)
    else:
        with pytest.raises(Refused, match="keeps its model ended") as error:
            ask()
        assert str(folder) in str(error.value.__cause__)
    killer.join()


def test_a_model_server_that_cannot_start_is_a_failure(
    ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Refused, match="could not be started") as error:
        ask()
    assert "flower.model_server=false runs without it" in str(error.value.__cause__)


def test_a_folder_that_others_can_enter_is_refused(ask: Ask, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(DroppeftError, match="can be entered by other users"):
        ask()


def test_a_long_path_is_not_used_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 100 * "x")
    assert len(str(model_server._folder())) < model_server.LONGEST_FOLDER


def test_the_watch_ends_the_process_although_its_files_are_gone(tmp_path: Path) -> None:
    code = (
        "from droppeft.transports.flower.model_server import _Watch; from pathlib import Path; "
        f"_Watch(Path({str(tmp_path / 'gone')!r}), 1).run()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_idle_model_server_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "s"
    place.touch()
    watch = model_server._Watch(place, os.getpid())
    assert watch._needed()
    monkeypatch.setattr(model_server, "IDLE_S", -1.0)
    assert not watch._needed()
    with watch.working():
        assert watch._needed()
    place.unlink()
    with watch.working():
        assert not watch._needed()
