"""The process beside a SuperNode: one for all messages, gone when it is not needed."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from droppeft.config import as_tree
from droppeft.errors import DroppeftError
from droppeft.federation import resident
from droppeft.federation.loading import identity
from droppeft.federation.packing import Errand, Packed, pack_plan, unpack_reply
from droppeft.federation.prepare import Prepared
from droppeft.plans import Failure, Plan, Reply, Update

MOST = 10**8


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sockets of this test alone, with a short path: it may have 107 characters."""
    short = Path(tempfile.mkdtemp(prefix="d"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    return short / f"droppeft-{os.getuid()}"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for the SuperNode."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        yield process
        process.kill()


@pytest.fixture
def packed(prepared: Prepared, plans: list[Plan]) -> Packed:
    errand = Errand(as_tree(prepared.config), identity(prepared.loaded), resident=True)
    return pack_plan(plans[0], errand)


def ask(packed: Packed, node_id: int = 7) -> Reply:
    return unpack_reply(resident.ask(packed, node_id, {}), MOST)


def residents(folder: Path) -> list[psutil.Process]:
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


def test_one_process_answers_all_and_ends_with_its_supernode(
    packed: Packed, folder: Path, watched: subprocess.Popen[bytes]
) -> None:
    first, second = ask(packed), ask(packed)
    assert isinstance(first, Update)
    assert isinstance(second, Update)
    assert first.train_loss == second.train_loss
    [process] = residents(folder)
    assert process.pid != os.getpid()
    # Loading happens within the first turn's message, not within the second's.
    assert ask(packed, node_id=8) is not None
    assert len(residents(folder)) == 2
    watched.kill()
    watched.wait()
    assert becomes_true(lambda: not residents(folder))
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_resident_process_that_died_is_a_failure_once(
    packed: Packed, folder: Path, watched: subprocess.Popen[bytes]
) -> None:
    assert isinstance(ask(packed), Update)
    [process] = residents(folder)
    process.kill()
    process.wait()
    assert isinstance(ask(packed), Update)  # its socket is there still; a new one is started


def test_death_while_it_works_is_said(
    packed: Packed, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(connection: object) -> Packed:
        raise EOFError

    monkeypatch.setattr(resident, "_receive", gone)
    reply = ask(packed)
    assert isinstance(reply, Failure)
    assert reply.reason.startswith("its resident process ended (EOFError); see ")
    for process in residents(folder):
        process.kill()


def test_a_folder_that_others_can_enter_is_refused(packed: Packed, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(DroppeftError, match="can be entered by others"):
        resident.ask(packed, 7, {})


def test_nobody_asks_nobody_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "s"
    place.touch()
    watch = resident._Watch(place, os.getpid())
    assert watch._needed()
    monkeypatch.setattr(resident, "IDLE_S", -1.0)
    assert not watch._needed()
    with watch.working():
        assert watch._needed()
    place.unlink()
    with watch.working():
        assert not watch._needed()
