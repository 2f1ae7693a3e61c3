"""States on disk: limited, complete or absent, and of earlier rounds only."""

import stat
from pathlib import Path

import pytest
import torch

from droppeft.cached_layers.state_store import SEGMENT_BYTES, StateStore, digest_of
from droppeft.messages.instruction import StateCache


def states(value: float, tokens: int = 4) -> torch.Tensor:
    return torch.full((tokens, 8), value, dtype=torch.float16)


def opened(folder: Path, round: int, content: str = "a", limit: int = 1 << 20) -> StateStore:
    return StateStore(folder / "client-0", content, round, StateCache("fp16", limit))


def fill(folder: Path, round: int, *digests: str, content: str = "a", limit: int = 1 << 20) -> None:
    store = opened(folder, round, content, limit)
    for number, digest in enumerate(digests):
        store.put(digest, states(number))
    store.flush()


def test_a_later_round_finds_the_states_of_an_earlier_one(tmp_path: Path) -> None:
    fill(tmp_path, 3, "x", "y")
    store = opened(tmp_path, 4)
    found = store.get("y")
    assert found is not None
    assert torch.equal(found, states(1))
    assert found.dtype == torch.float16
    assert store.get("z") is None


def test_states_can_be_read_before_and_after_they_are_written(tmp_path: Path) -> None:
    store = opened(tmp_path, 1)
    store.put("x", states(5))
    assert torch.equal(store.get("x"), states(5))  # type: ignore[arg-type]
    assert store.bytes == 0
    store.flush()
    assert torch.equal(store.get("x"), states(5))  # type: ignore[arg-type]
    assert store.bytes > 0


@pytest.mark.parametrize("round", [2, 1])
def test_a_repeated_round_does_not_find_its_own_states(tmp_path: Path, round: int) -> None:
    fill(tmp_path, 2, "x")
    store = opened(tmp_path, round)
    assert store.get("x") is None
    assert store.bytes == 0


def test_states_of_another_content_are_deleted(tmp_path: Path) -> None:
    fill(tmp_path, 1, "x", content="a")
    fill(tmp_path, 2, "y", content="b")
    store = opened(tmp_path, 3, "b")
    assert store.get("x") is None
    assert store.get("y") is not None
    assert len(list((tmp_path / "client-0").iterdir())) == 1


def test_the_oldest_are_deleted_at_the_limit(tmp_path: Path) -> None:
    fill(tmp_path, 1, "x")
    limit = int(2.5 * opened(tmp_path, 2).bytes)
    for round, digest in enumerate("yz", start=2):
        fill(tmp_path, round, digest, limit=limit)
        assert opened(tmp_path, 9, limit=limit).bytes <= limit
    store = opened(tmp_path, 9, limit=limit)
    assert [store.get(digest) is not None for digest in "xyz"] == [False, True, True]


def test_a_file_above_the_limit_is_not_written(tmp_path: Path) -> None:
    fill(tmp_path, 1, "x", limit=10)
    assert opened(tmp_path, 2, limit=10).bytes == 0


def test_many_states_are_written_in_several_files(tmp_path: Path) -> None:
    store = opened(tmp_path, 1, limit=4 * SEGMENT_BYTES)
    large = torch.zeros(SEGMENT_BYTES // 16 // 2 + 1, 8, dtype=torch.float16)
    for digest in "abcd":
        store.put(digest, large.clone())
    assert store.bytes > SEGMENT_BYTES
    assert all(store.get(digest) is not None for digest in "abcd")


@pytest.mark.parametrize("damage", [b"", b"\x00" * 64, b"short"])
def test_a_damaged_file_is_deleted(tmp_path: Path, damage: bytes) -> None:
    fill(tmp_path, 1, "x")
    [path] = (tmp_path / "client-0").iterdir()
    path.write_bytes(damage)
    store = opened(tmp_path, 2)
    assert store.get("x") is None
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "client-0").write_text("a file where the folder should be")
    fill(tmp_path, 1, "x")
    assert opened(tmp_path, 2).get("x") is None


def test_only_the_owner_can_read_the_folder(tmp_path: Path) -> None:
    fill(tmp_path, 1, "x")
    assert stat.S_IMODE((tmp_path / "client-0").stat().st_mode) == 0o700


def test_a_digest_depends_on_where_a_column_ends() -> None:
    assert digest_of(b"ab", b"c") != digest_of(b"a", b"bc")
    assert digest_of(b"ab") == digest_of(b"ab")
