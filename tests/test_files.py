"""A crash while writing leaves the old content or the new."""

from pathlib import Path

import pytest

from droppeft.files import write_atomically


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
