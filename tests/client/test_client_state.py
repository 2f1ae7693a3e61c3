"""The client state: it is complete or lost, and files that are no longer needed are deleted."""

import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from droppeft.client.client_state import client_folder, load_tensors, save_tensors
from droppeft.errors import DroppeftError
from droppeft.messages.tensors import HEAD, Tensors, flatten
from droppeft.refusals import Refused

RUN = "0123456789abcdef"


def tensors(value: float) -> Tensors:
    layers = {layer: {"b|A": np.full((2, 3), value + layer, np.float32)} for layer in (11, 2)}
    return {**layers, HEAD: {"W": np.full(1, value, np.float32)}}


def rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_are_loaded_bit_for_bit_and_in_order(tmp_path: Path) -> None:
    save_tensors(tmp_path, 3, None, tensors(0.1))
    found, expected = list(flatten(load_tensors(tmp_path, 3))), list(flatten(tensors(0.1)))
    assert [item[:2] for item in found] == [item[:2] for item in expected]
    for (_, _, one), (_, _, other) in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()
        assert one.shape == other.shape


def test_every_run_and_client_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DROPPEFT_STATE", str(tmp_path))
    folders = {client_folder(run, client) for run in (RUN, RUN[::-1]) for client in (0, 1)}
    assert len(folders) == 4
    assert all(tmp_path in folder.parents for folder in folders)


@pytest.mark.parametrize("run", ["", "../../etc", "a/b", "RUN", "f" * 65])
def test_a_server_cannot_choose_another_folder(run: str) -> None:
    with pytest.raises(DroppeftError, match="the instruction has no valid run name"):
        client_folder(run, 0)


def test_only_the_owner_can_read_the_folder(tmp_path: Path) -> None:
    save_tensors(tmp_path / "run" / "client", 1, None, tensors(1.0))
    assert (tmp_path / "run" / "client").stat().st_mode & 0o077 == 0


def test_a_lost_reply_changes_nothing(tmp_path: Path) -> None:
    """The server does not know of rounds 4 and 5, so their files are deleted at the next save."""
    save_tensors(tmp_path, 3, None, tensors(3.0))
    for round in (4, 5):
        save_tensors(tmp_path, round, 3, tensors(float(round)))
        np.testing.assert_array_equal(load_tensors(tmp_path, 3)[HEAD]["W"], [3.0])
    assert rounds(tmp_path) == ["round-000003.safetensors", "round-000005.safetensors"]


def test_a_server_that_goes_back_finds_what_it_knows(tmp_path: Path) -> None:
    """A server has two checkpoints: from round 9 it may go back to 8, which starts from state 7."""
    before = None
    for round in (5, 6, 7, 8, 9):
        save_tensors(tmp_path, round, before, tensors(float(round)))
        before = round
    assert rounds(tmp_path) == [f"round-00000{round}.safetensors" for round in (7, 8, 9)]
    save_tensors(tmp_path, 8, 7, tensors(80.0))
    assert rounds(tmp_path) == [f"round-00000{round}.safetensors" for round in (7, 8, 9)]
    np.testing.assert_array_equal(load_tensors(tmp_path, 8)[HEAD]["W"], [80.0])


def test_a_late_local_training_deletes_no_file_of_a_later_round(tmp_path: Path) -> None:
    """Two processes of a simulation: round 5 was given up, and ends after round 6 was merged."""
    save_tensors(tmp_path, 4, None, tensors(4.0))
    save_tensors(tmp_path, 6, 4, tensors(6.0))
    save_tensors(tmp_path, 5, 4, tensors(5.0))
    np.testing.assert_array_equal(load_tensors(tmp_path, 6)[HEAD]["W"], [6.0])


def test_a_file_that_cannot_be_read_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "round-000002.safetensors").mkdir()
    with pytest.raises(DroppeftError, match="cannot be read") as error:
        load_tensors(tmp_path, 2)
    assert not isinstance(error.value, Refused)


def test_the_state_folder_does_not_depend_on_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DROPPEFT_STATE", "here")
    with pytest.raises(DroppeftError, match="DROPPEFT_STATE=here is not an absolute path"):
        client_folder(RUN, 0)
    monkeypatch.delenv("DROPPEFT_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert client_folder(RUN, 3) == tmp_path / "droppeft" / RUN / "client-000003"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert client_folder(RUN, 0) == Path.home() / ".local/state/droppeft" / RUN / "client-000000"


def test_a_missing_file_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(Refused, match="saved in round 2 is missing or damaged"),
    ):
        load_tensors(tmp_path, 2)
    assert "round-000002.safetensors is missing" in caplog.text


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_file_is_lost(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tensors(tmp_path, 2, None, tensors(1.0))
    path = tmp_path / "round-000002.safetensors"
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    changed = {"flip": flipped, "cut": content[:-5], "empty": b"", "text": b"hello" * 20}
    path.write_bytes(changed[damage])
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(Refused, match="saved in round 2 is missing or damaged"),
    ):
        load_tensors(tmp_path, 2)
    assert "is damaged (" in caplog.text


@pytest.mark.parametrize("other", ["run-a/client-1/4", "run-a/client-2/3", "run-b/client-1/3"])
def test_a_file_of_another_round_client_or_run_is_lost(
    other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An undamaged file in the wrong folder, or with the wrong name."""
    place, _, round = other.rpartition("/")
    save_tensors(tmp_path / place, int(round), None, tensors(1.0))
    [path] = (tmp_path / place).iterdir()
    here = tmp_path / "run-a" / "client-1"
    here.mkdir(parents=True, exist_ok=True)
    if path != here / "round-000003.safetensors":
        shutil.copy(path, here / "round-000003.safetensors")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(Refused, match="saved in round 3 is missing or damaged"),
    ):
        load_tensors(here, 3)
    assert f"it is of round {round} of {place}" in caplog.text


def test_temporary_files_of_killed_processes_are_deleted_after_a_while(tmp_path: Path) -> None:
    old, new = (tmp_path / f".round-000001.safetensors.{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"values")
    os.utime(old, (time.time() - 7200,) * 2)
    save_tensors(tmp_path, 2, None, tensors(1.0))
    assert (old.exists(), new.exists()) == (False, True)


def test_an_error_says_that_the_disk_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DroppeftError, match="this client's tensors cannot be saved"):
        save_tensors(tmp_path / "file" / "client", 1, None, tensors(1.0))


def test_only_the_owner_can_read_a_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "own", 1, None, tensors(0.1))
    [path] = (tmp_path / "own").iterdir()
    assert path.stat().st_mode & 0o077 == 0
    assert (tmp_path / "own").stat().st_mode & 0o077 == 0
