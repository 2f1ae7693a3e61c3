"""The task of settings that name none, from the model and the columns of the data."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from droppeft.config import load_config
from droppeft.config.task_detection import CONVERSATION_COLUMNS, columns_of
from droppeft.data.conversation_shapes import SHAPES


def test_the_columns_are_those_that_are_read() -> None:
    assert {name: shape.required for name, shape in SHAPES.items()} == CONVERSATION_COLUMNS


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("text", "label"), "classification"),
        (("text", "sentiment"), "classification"),  # the reader asks which column is the label
        (("text",), "causal_lm"),
        (("question", "answer"), "classification"),
        (("prompt", "completion"), "causal_lm"),
        (("prompt", "completion", "label"), "causal_lm"),
        (("instruction", "input", "output", "text"), "causal_lm"),
        (("instruction", "context", "response", "category"), "causal_lm"),
        (("messages",), "causal_lm"),
        (("conversations", "id"), "causal_lm"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_columns_tell_the_task(
    tmp_path: Path, columns: tuple[str, ...], expected: str, ending: str
) -> None:
    path = tmp_path / f"train.{ending}"
    row = dict.fromkeys(columns, "a")
    if ending == "csv":
        path.write_text(f"{','.join(columns)}\n{','.join('a' for _ in columns)}\n")
    elif ending == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if ending == "json" else row))
    assert tuple(columns_of(path)) == columns
    assert load_config(None, [f"data={path}"]).task == expected
    assert load_config(None, [f"data={tmp_path}"]).task == expected
    assert load_config(None, [f"data={path}", "task=classification"]).task == "classification"


def test_models_and_settings_tell_the_task(tmp_path: Path) -> None:
    def task(*settings: str) -> str:
        return load_config(None, list(settings)).task

    assert task() == task("model=mpnet") == task("data=owner/name") == "classification"
    assert task("model=smollm2") == task("model=some/model.gguf") == "causal_lm"
    other = tmp_path / "other.csv"
    other.write_text("question,answer\na,b\n")
    assert task(f"data={other}", "source.text=question", "source.label=answer") == "classification"
    assert (
        task(f"data={other}", "source.prompt=question", "source.completion=answer") == "causal_lm"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", b""),
        ("empty.jsonl", b""),
        ("list.json", b"[]"),
        ("words.json", b"[1, 2]"),
        ("broken.jsonl", b"{"),
        ("bytes.csv", b"\xff\xfe\x00"),
        ("broken.parquet", b"PAR1"),
        ("notes.txt", b"text"),
    ],
)
def test_what_cannot_be_read_is_left_to_the_reader(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert load_config(None, [f"data={path}"]).task == "classification"
    assert load_config(None, [f"data={tmp_path / 'missing'}"]).task == "classification"
