from pathlib import Path

import pytest

from droppeft.data.cache import cache_dir, store


@pytest.mark.parametrize(
    ("folder", "parent", "expected"),
    [
        ("/a", "/b", Path("/a")),
        (None, "/b", Path("/b/droppeft")),
        (None, None, Path("/home/someone/.cache/droppeft")),
        ("", "", Path("/home/someone/.cache/droppeft")),
    ],
)
def test_the_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, folder: str | None, parent: str | None, expected: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in (("DROPPEFT_CACHE", folder), ("XDG_CACHE_HOME", parent)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cache_dir() == expected


def test_store_creates_the_folder_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "entry"
    store(path, b"first")
    store(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_only_the_owner_can_read_it_whatever_the_rights_were(tmp_path: Path) -> None:
    loose = tmp_path / "cache" / "loose"
    loose.mkdir(parents=True)
    (loose / "entry").touch()
    for path in (loose / "entry", loose, loose.parent):
        path.chmod(0o777)
    store(loose / "entry", b"content")
    store(loose.parent / "new" / "inside" / "entry", b"content")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    # The cache folder itself, which the user may share, is left as it is.
    assert modes == {"cache": 0o777, "loose": 0o700, "new": 0o700, "inside": 0o700, "entry": 0o600}


def test_a_failed_write_leaves_only_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "entry"
    store(path, b"old")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    store(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_created_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store(tmp_path / "file" / "entry", b"content")
    assert (tmp_path / "file").read_bytes() == b""
