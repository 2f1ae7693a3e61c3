"""Counts of steps are stored in the cache folder."""

from pathlib import Path

import pytest

from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.costs.stored_counts import stored_counts

COUNTS = StepCounts(2, 8, (BlockCounts(1, 2, 3, 4, 5, 6),) * 2, BlockCounts(7, -8, 9, 1, 2, 3), 4)


def test_a_step_is_counted_once_for_each_key_and_again_if_the_file_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path))
    counted = []

    def count() -> StepCounts:
        counted.append(1)
        return COUNTS

    assert [stored_counts(key, count) for key in ("a", "a", "b")] == [COUNTS] * 3
    assert len(counted) == 2
    for file in (tmp_path / "step-counts").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    assert stored_counts("a", count) == COUNTS
    assert len(counted) == 3
