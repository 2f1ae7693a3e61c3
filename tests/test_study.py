"""What a study writes is read back as it was."""

from pathlib import Path

import pytest

from benchmarks import study

ROWS = [
    {"model": 'a, "b"', "repeat": 0, "step_s": 0.1 + 0.2, "same": True, "note": None},
    {"model": "none", "repeat": 1, "step_s": 1 / 3, "same": False, "note": "", "rate": 0.5},
]
READ = [{**ROWS[0], "rate": None}, ROWS[1]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    (tmp_path / "some").mkdir()
    return tmp_path / "some"


def test_rows_keep_their_order_texts_and_every_digit() -> None:
    study.write_table("some", "result", ROWS)
    assert study.read_table("some") == READ


def test_the_same_rows_make_the_same_file(folder: Path) -> None:
    files = []
    for table in ("one", "other"):
        study.write_table("some", table, ROWS)
        files.append((folder / f"{table}.csv.gz").read_bytes())
    assert files[0] == files[1]


def test_rows_are_added_under_the_columns_that_are_there() -> None:
    one, other = READ
    study.append_rows("some", "result", [dict(reversed(one.items()))])
    study.append_rows("some", "result", [{**other, "note": "later"}])
    assert study.read_table("some") == [one, {**other, "note": "later"}]


def test_a_row_with_another_column_is_not_added() -> None:
    study.write_table("some", "result", ROWS)
    with pytest.raises(ValueError, match="surprise"):
        study.append_rows("some", "result", [{"surprise": 1}])
    assert study.read_table("some") == READ


def test_single_values_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not study.was_measured("some")
    monkeypatch.setattr("sys.argv", ["run.py", "/texts", "--repeats", "3"])
    study.write_values("some", {**study.about("some", data=Path("/texts")), "seeds": [0, 1]})
    assert study.was_measured("some")
    found = study.read_values("some")
    assert found["command"] == "python -m benchmarks.some.run $DROPPEFT_DATA --repeats 3"
    assert found["seeds"] == [0, 1]
    assert {"schema_version", "versions", "machine"} < found.keys()
