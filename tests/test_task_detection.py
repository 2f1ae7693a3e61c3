"""The task is found from the model and the columns of the data, and what is given wins."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from chats import write_lines
from droppeft.config import load_config
from droppeft.config.task_detection import CONVERSATION_COLUMNS, columns_of, detected_task
from droppeft.data.conversation_shapes import SHAPES

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt and completion": ({"prompt": "a", "completion": "b"}, "causal_lm"),
    "messages": ({"messages": CHAT}, "causal_lm"),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "a"}]}, "causal_lm"),
    "Alpaca": ({"instruction": "a", "input": "", "output": "b"}, "causal_lm"),
    "Dolly": ({"instruction": "a", "context": "", "response": "b"}, "causal_lm"),
    "text": ({"text": "a"}, "causal_lm"),
    "text with label": ({"text": "a", "label": 1}, "classification"),
    "messages with label": ({"messages": CHAT, "label": 1}, "causal_lm"),
    "pair": ({"sentence1": "a", "sentence2": "b", "label": 1}, "classification"),
    "unknown": ({"words": "a"}, "classification"),
    # The reader asks which column is the label.
    "text with another column": ({"text": "a", "sentiment": "b"}, "classification"),
}


def test_the_columns_are_those_that_are_read() -> None:
    assert {name: shape.required for name, shape in SHAPES.items()} == CONVERSATION_COLUMNS


def found(data: object, **more: Any) -> str:
    return detected_task({"data": str(data), **more})


@pytest.mark.parametrize("name", ROWS)
def test_columns_tell(name: str, tmp_path: Path) -> None:
    row, task = ROWS[name]
    assert found(write_lines(tmp_path / "rows.jsonl", [row])) == task
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert found(tmp_path / "rows.json") == task
    pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert found(tmp_path / "rows.parquet") == task
    if all(isinstance(value, str | int) for value in row.values()):
        (tmp_path / "rows.csv").write_text(",".join(row) + "\n" + ",".join("ab" for _ in row))
        assert found(tmp_path / "rows.csv") == task


def test_a_folder_is_its_first_file(tmp_path: Path) -> None:
    assert found(tmp_path) == "classification"
    (tmp_path / "README.md").write_text("text")
    write_lines(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    assert found(tmp_path) == "causal_lm"


def test_a_json_file_may_hold_lines_and_a_csv_file_a_byte_order_mark(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.json", [{"messages": CHAT}])
    assert columns_of(tmp_path / "rows.json") == ("messages",)
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\na,b\n")
    assert columns_of(tmp_path / "rows.csv") == ["prompt", "completion"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"[",
        b"[]",
        b"7\n",
        b"[7]",
        b"\xff\xfe\x00",
        b"null",
        gzip.compress(b"prompt", mtime=0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".txt"])
def test_what_cannot_be_read_is_left_to_the_reader(
    content: bytes, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    assert found(path) == "classification"


def test_the_model_tells_where_the_data_do_not() -> None:
    assert detected_task({}) == "classification"
    assert found("builtin", model="smollm2") == "causal_lm"
    assert found("missing.csv", model="folder/some.gguf") == "causal_lm"
    assert found("someone/something") == "classification"  # the hub is not asked
    assert found("someone/something", source={"prompt": "q", "completion": "a"}) == "causal_lm"
    assert found("someone/something", source={"label": "stars"}) == "classification"


def test_a_run_on_conversations_takes_smollm2(tmp_path: Path) -> None:
    """And what is given wins."""
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    config = load_config(None, [f"data={chats}"])
    assert (config.task, config.model, config.partition.kind) == ("causal_lm", "smollm2", "iid")
    given = load_config(None, [f"data={chats}", "model=other", "training.batch_size=3"])
    assert (given.model, given.training.batch_size, given.training.max_length) == ("other", 3, 256)
    assert load_config(None, [f"data={chats}", "task=classification"]).model == "builtin"
    builtin = load_config(None, ["task=causal_lm"])
    assert (builtin.model, builtin.data) == ("smollm2", "builtin")
    assert (builtin.partition.kind, builtin.partition.key) == ("natural", "package")
