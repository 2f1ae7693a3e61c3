"""``droppeft data``: what is recognised, and rows as a model sees them."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from chat_tokenizer import chat_tokenizer
from droppeft.config import load_config
from droppeft.data.summary import check_settings, summarise
from droppeft.report.show_data import LEARNT, show
from refusals import refused


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = [{"prompt": f"what {n}", "completion": "yes " * n, "who": n % 3} for n in range(1, 21)]
    return lines(tmp_path / "chats.jsonl", rows)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"text": f"hello {n}", "label": ["bad", "good"][n % 2]} for n in range(20)]
    return lines(tmp_path / "texts.jsonl", rows)


def printed(path: Path, *settings: str) -> str:
    config = load_config(None, [f"data={path}", "training.max_length=20", *settings])
    summary = summarise(config, chat_tokenizer, 2)
    console = Console(width=100, record=True, color_system=None, file=io.StringIO())
    show("chats", "tiny", summary, console)
    return console.export_text()


def test_conversations_are_summarised_and_shown(chats: Path) -> None:
    text = printed(chats, "source.label=who", "partition.key=who")
    assert "chats · for a causal language model" in text
    assert "17 to train and 3 to test" in text
    assert "prompt, completion, category ← who, owner ← who" in text
    assert "categories  3, largest first  train  test" in text
    assert "owners      3; rows: " in text
    assert "clients     none: 17 training rows are too few for clients=20" in text
    assert "check       there is no test split, so the rows of a fifth of the prompts" in text
    assert "lose the end of what is learnt" in text
    assert "<|im_start|>assistant\n[[yes" in text
    assert text.count("row ") == 2


def test_colours_tell_what_is_learnt(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, [f"data={chats}", "training.max_length=200"])
    summary = summarise(config, chat_tokenizer, 1)
    assert summary.learnt is not None
    assert 0 < summary.learnt < 1
    show("chats", "tiny", summary, Console(force_terminal=True, color_system="standard", width=80))
    out = capsys.readouterr().out
    assert "[[" not in out
    assert LEARNT == "bold green"
    assert "\x1b[1;32myes" in out
    assert "\x1b[2m<|im_start|>user" in out


def test_texts_are_summarised_with_their_classes(texts: Path) -> None:
    text = printed(texts)
    assert "for classification of texts" in text
    assert "columns     text, label" in text
    assert re.search("bad +8 +2", text)
    assert "no row at training.max_length=20" in text
    assert "at most: 90 % " in text
    assert "tokens · " in text
    assert "2 classes have fewer than 10 training rows: bad (8), good (8)" in text


def test_the_clients_of_a_run_are_shown(texts: Path) -> None:
    few = ("clients=2", "partition.kind=iid", "partition.min_rows=3")
    assert "clients     2; rows: 8 each; classes: 2 each" in printed(texts, *few)
    owned = [{**json.loads(row), "who": "abbb"[n % 4]} for n, row in enumerate(texts.open())]
    lines(texts, owned)
    natural = ("partition.kind=natural", "partition.key=who", "partition.min_rows=6")
    text = printed(texts, *natural)
    assert "clients     1; rows: 11 each; classes: 2 each" in text
    assert "leaves out 5 of 16 training rows: those of 1 owner with fewer than" in text


def test_settings_without_an_effect_are_refused() -> None:
    check_settings(["model=smollm2", "source.label=kind", "training.max_length=64"])
    with refused("rounds does not change what droppeft data shows; it takes task, "):
        check_settings(["rounds=3"])
