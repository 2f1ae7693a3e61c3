"""A crash while writing leaves the old content or the new."""

import os
import time
from pathlib import Path

import pytest

from droppeft.files import LEFT_BEHIND_S, remove_left_behind, write_atomically


def test_content_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for content in (b"first, and long", b"new"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_crash_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, b"old")

    def crash(*values: object) -> None:
        raise OSError("power is gone")

    monkeypatch.setattr(step, crash)
    with pytest.raises(OSError, match="power"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_content_is_durable_before_it_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    replace = Path.replace
    monkeypatch.setattr("os.fsync", lambda handle: order.append("fsync"))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("rename"), replace(self, to))[1]
    )
    write_atomically(tmp_path / "file", b"content")
    assert order == ["fsync", "rename", "fsync"]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    names = (".file.json.new", ".file.json.old", ".other.old", ".file.json.folder", "file.json")
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("folder") else (tmp_path / name).touch()
    (tmp_path / ".file.json.folder" / "inside").touch()
    long_ago = time.time() - LEFT_BEHIND_S - 1
    for name in (".file.json.old", ".file.json.folder", ".other.old", "file.json"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    remove_left_behind(tmp_path, "file.json.*")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".file.json.new", ".other.old", "file.json"}
    remove_left_behind(tmp_path, "*", older_than_s=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
