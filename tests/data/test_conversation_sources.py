import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from droppeft.config import SourceConfig
from droppeft.data.conversation_shapes import detect_shape
from droppeft.data.conversation_sources import load_conversations
from droppeft.data.conversations import (
    Conversation,
    ConversationData,
    Document,
    Message,
    content_of,
    prompt_of,
    reference_of,
)
from droppeft.data.sources import load_text
from refusals import refused

Write = Callable[[Path, Mapping[str, Any]], Path]

DEFAULT = SourceConfig()
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, source: SourceConfig = DEFAULT, key: str | None = None) -> ConversationData:
    return load_conversations(str(path), source, key)


def only(tmp_path: Path, row: Mapping[str, Any], source: SourceConfig = DEFAULT) -> object:
    """The content of a row that is alone in both splits of a folder."""
    for name in ("train", "test"):
        lines(tmp_path / f"{name}.jsonl", [row])
    data = load(tmp_path, source)
    assert data.train.rows == data.test.rows
    return content_of(data.train.rows[0])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "P", "completion": "C"}, [["user", "P"], ["assistant", "C"]]),
        (
            {"prompt": TURNS[:2], "completion": TURNS[2:3]},
            [["system", "Be kind."], ["user", "Hello"], ["assistant", "Hi"]],
        ),
        ({"messages": TURNS}, [[turn["role"], turn["content"]] for turn in TURNS]),
        ({"messages": TURNS[2:]}, [["assistant", "Hi"], ["user", "Bye"], ["assistant", "See you"]]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "H"},
                    {"from": "gpt", "value": "G"},
                ]
            },
            [["system", "S"], ["user", "H"], ["assistant", "G"]],
        ),
        (
            {"instruction": "I", "input": "X", "output": "O", "text": "all of it"},
            [["user", "I\n\nX"], ["assistant", "O"]],
        ),
        ({"instruction": "I", "input": "", "output": "O"}, [["user", "I"], ["assistant", "O"]]),
        ({"instruction": "I", "input": None, "output": "O"}, [["user", "I"], ["assistant", "O"]]),
        ({"instruction": "I", "output": "O"}, [["user", "I"], ["assistant", "O"]]),
        (
            {"instruction": "I", "context": "X", "response": "R", "category": "open_qa"},
            [["user", "I\n\nX"], ["assistant", "R"]],
        ),
        ({"text": " a text\n"}, " a text\n"),
    ],
)
def test_a_row_of_each_shape_is_converted(
    tmp_path: Path, row: Mapping[str, Any], expected: object
) -> None:
    assert only(tmp_path, row) == expected


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        (("prompt", "completion"), "prompt/completion"),
        (("messages", "prompt", "prompt_id"), "messages"),
        (("conversations", "id"), "ShareGPT"),
        (("instruction", "input", "output", "text"), "Alpaca"),
        (("instruction", "context", "response"), "Dolly"),
        (("text", "label"), "text"),
        (("prompt",), None),
        (("question", "answer"), None),
    ],
)
def test_shapes_are_detected_by_columns(columns: Sequence[str], shape: str | None) -> None:
    assert detect_shape(columns) == shape


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {"meaning_representation": "name[X]", "human_reference": "It is X.", "text": "no"}
    chosen = SourceConfig(prompt="meaning_representation", completion="human_reference")
    assert only(tmp_path, row, chosen) == [["user", "name[X]"], ["assistant", "It is X."]]
    assert only(tmp_path, row, SourceConfig(text=("human_reference",))) == "It is X."


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_all_formats_give_the_same_rows(tmp_path: Path, write: Write, suffix: str) -> None:
    columns = {"prompt": ['a, "b"', "c\nd"], "completion": ["ü", "x"]}
    for name in ("train", "test"):
        write(tmp_path / f"{name}{suffix}", columns)
    found = [content_of(row) for row in load(tmp_path).train.rows]
    assert found == [
        [["user", 'a, "b"'], ["assistant", "ü"]],
        [["user", "c\nd"], ["assistant", "x"]],
    ]


def test_json_files_hold_a_list_or_an_object_per_line(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "completion": "c"} for number in range(10)]
    lines(tmp_path / "lines.json", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    whole = load(tmp_path / "list.json")
    assert load(tmp_path / "lines.json").content_hash == whole.content_hash
    assert (len(whole.train), len(whole.test)) == (8, 2)


# Splits, categories, owners


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """60 rows in random order: 20 prompts with three answers each, in two categories."""
    rows = [
        {"prompt": f"p{n // 3}", "completion": f"c{n}", "kind": "ab"[n // 3 % 2], "who": n % 4}
        for n in np.random.default_rng(0).permutation(60).tolist()
    ]
    return lines(tmp_path / "rows.jsonl", rows)


def test_a_fifth_of_the_prompts_becomes_the_test_split(answers: Path) -> None:
    data = load(answers)
    assert (len(data.train), len(data.test)) == (48, 12)
    both = [{prompt_of(row) for row in table.rows} for table in (data.train, data.test)]
    assert not both[0] & both[1]
    assert (data.label_names, set(data.train.labels.tolist())) == ((), {0})
    assert data.train.labels.dtype == np.int64


def test_the_test_split_does_not_depend_on_row_order(answers: Path) -> None:
    before = {content for row in load(answers).test.rows if (content := reference_of(row))}
    answers.write_text("\n".join(reversed(answers.read_text().splitlines())))
    assert {reference_of(row) for row in load(answers).test.rows} == before


def test_categories_and_owners_are_read_where_they_are_named(answers: Path) -> None:
    data = load(answers, SourceConfig(label="kind"), "who")
    assert data.label_names == ("a", "b")
    assert np.bincount(data.train.labels).tolist() == [24, 24]  # a fifth of each category
    assert np.bincount(data.test.labels).tolist() == [6, 6]
    for row, label, owner in zip(
        data.train.rows, data.train.labels, data.train.keys or (), strict=True
    ):
        number = int(reference_of(row)[1:])
        assert (label, owner) == (number // 3 % 2, str(number % 4))
    assert data.test.keys is None


def test_a_folder_with_a_train_file_alone_is_split(answers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    answers.rename(folder / "train.jsonl")
    data = load(folder)
    assert (len(data.train), len(data.test)) == (48, 12)
    (folder / "train.jsonl").rename(folder / "validation.jsonl")
    assert load(folder, SourceConfig(train="validation")).content_hash == data.content_hash
    with refused("has no split test, only validation; name one with source.test"):
        load(folder, SourceConfig(train="validation", test="test"))


def test_the_hub_needs_no_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"messages": [TURNS] * 3 + [TURNS[:3]] * 2 + [TURNS[1:3]] * 5}
    hub = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: hub)
    data = load_conversations("someone/chats", DEFAULT)
    assert data.shape == "messages"
    assert len(data.train) + len(data.test) == 10


def test_a_limit_selects_a_subset(answers: Path) -> None:
    data = load(answers, SourceConfig(max_train_rows=7, max_test_rows=2))
    assert (len(data.train), len(data.test)) == (7, 2)
    assert set(data.train.rows) <= set(load(answers).train.rows)


def test_the_hash_depends_on_every_part(answers: Path) -> None:
    plain = load(answers)
    assert plain.content_hash == load(answers, key="who").content_hash
    assert plain.content_hash != load(answers, SourceConfig(label="kind")).content_hash
    assert plain.content_hash != load(answers, SourceConfig(max_test_rows=11)).content_hash
    answers.write_text(answers.read_text().replace("c59", "c60"))
    assert plain.content_hash != load(answers).content_hash


def test_prompt_and_reference_of_a_row() -> None:
    turns = tuple(Message(turn["role"], turn["content"]) for turn in TURNS)
    assert prompt_of(Conversation(turns)) == turns[:4]
    assert reference_of(Conversation((*turns, Message("user", "?")))) == "See you"
    assert (prompt_of(Document("x")), reference_of(Document("x"))) == ((), "x")


# Bad input


GOOD: dict[str, Any] = {"prompt": "p", "completion": "c"}


def message(**values: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "u"}, values]}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([GOOD, {"prompt": "p", "completion": " "}], "row 2: completion is an empty completion"),
        ([GOOD, {"prompt": "p", "completion": None}], "row 2: completion is missing"),
        ([GOOD, {"prompt": "p"}], "row 2: completion is missing"),
        ([{"prompt": 1, "completion": 2}], "row 1: prompt and completion are neither both text"),
        ([message(role="bot", content="a")], "row 1: message 2 of messages has the unknown role b"),
        ([message(role="assistant", content="")], "message 2 of messages is an empty completion"),
        (
            [message(role="assistant", content=[1])],
            r"row 1: messages\.\[\]\.content is of type array",
        ),
        ([message(content="a")], "message 2 of messages has no role"),
        ([message(role="assistant")], "message 2 of messages is missing"),
        ([message(role="user", content="a")], "row 1: no message is the assistant's"),
        ([{"messages": []}], "row 1: no message is the assistant's"),
        ([{"messages": "hello"}], "row 1: messages is not a list of messages"),
        ([{"messages": ["hello"]}], "row 1: message 1 of messages is not an object with role"),
        ([{"text": "a"}, {"text": "\n"}], "row 2: text is empty"),
        ([{"text": 3}], "row 1: text is not text"),
        ([{"instruction": "i", "output": ""}], "row 1: output is an empty completion"),
        ([{"instruction": 1, "output": "o"}], "row 1: instruction is not text"),
        (
            [{"messages": TURNS}, GOOD],
            r"row 2: messages is missing \(the row has the shape prompt/completion, and all rows",
        ),
        ([{"question": "q", "answer": "a"}], "none of the known shapes fits its columns question"),
        ([GOOD, {"prompt": "p", "completion": 5}], "row 2: completion is of type number, and els"),
        ([GOOD], "has too few rows for a test split"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    tmp_path: Path, rows: Sequence[Mapping[str, Any]], sentence: str
) -> None:
    path = lines(tmp_path / "rows.jsonl", rows)
    with refused(sentence) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_every_bad_row_is_counted(tmp_path: Path) -> None:
    empty = {"prompt": "p", "completion": ""}
    path = lines(tmp_path / "rows.jsonl", [GOOD, empty, GOOD, empty, empty])
    with refused("row 2: .*, and 2 other rows cannot be used either; correct or remove them"):
        load(path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n\n{"prompt": "p", "compl\n')
    with refused(r"rows\.jsonl: line 3 is not valid JSON \(Unterminated string"):
        load(path)
    path.write_text('{"text": "a"}\n["text"]\n')
    with refused("line 2 is not a JSON object; correct or remove it"):
        load(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"text": "a"},\n{"text": }]', r"is not valid JSON: Expecting value: line 2 column 10"),
        ('[{"text": "a"}, 3]', "row 2 is not an object with columns"),
        ('{"rows": [1,\n2]}', "none of the known shapes fits its columns rows"),
        ("[]", "the list has no rows"),
        ("\n", "the file is empty"),
    ],
)
def test_a_broken_json_file_is_named(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with refused(sentence) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_settings_that_do_not_fit_are_refused(answers: Path) -> None:
    with refused("source.text must name one column"):
        load(answers, SourceConfig(text=("prompt", "completion")))
    with refused("has no column category"):
        load(answers, SourceConfig(label="category"))
    with refused("has no column user"):
        load(answers, key="user")
    with refused("no column answer"):
        load(answers, SourceConfig(prompt="prompt", completion="answer"))
    with refused("source.prompt does not apply to data=builtin"):
        load_conversations("builtin", SourceConfig(prompt="a", completion="b"))
    with refused("no column writer; partition.key can be package"):
        load_conversations("builtin", DEFAULT, "writer")
    with refused("source.prompt does not apply to classification"):
        load_text(str(answers), SourceConfig(prompt="prompt", completion="completion"))
    with refused("no such file or folder"):
        load_conversations("./nowhere.jsonl", DEFAULT)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prompt": "a"}, "must be given together"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "not both"),
    ],
)
def test_column_settings_are_checked_together(settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SourceConfig.model_validate(settings)
