"""``droppeft data``: what is recognised, and rows as a model sees them."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from chat_tokenizer import chat_tokenizer
from droppeft.config import SourceConfig
from droppeft.data.summary import Kind, check_settings, recognise, summarise
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


def printed(path: Path, kind: Kind, source: SourceConfig, key: str | None = None) -> str:
    summary = summarise(str(path), kind, source, key, chat_tokenizer(), 20, 2)
    console = Console(width=100, record=True, color_system=None, file=io.StringIO())
    show("chats", "tiny", summary, console)
    return console.export_text()


def test_conversations_are_summarised_and_shown(chats: Path) -> None:
    text = printed(chats, "causal_lm", SourceConfig(label="who"), "who")
    assert "chats · for a causal language model" in text
    assert "prompt, completion, who" in text
    assert "17 to train and 3 to test" in text
    assert "categories  3: " in text
    assert "owners      3, with " in text
    assert "lose the end of what is learnt" in text
    assert "<|im_start|>assistant\n[[yes" in text
    assert text.count("row ") == 2


def test_colours_tell_what_is_learnt(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarise(str(chats), "causal_lm", SourceConfig(), None, chat_tokenizer(), 200, 1)
    assert summary.learnt is not None
    assert 0 < summary.learnt < 1
    show("chats", "tiny", summary, Console(force_terminal=True, color_system="standard", width=80))
    out = capsys.readouterr().out
    assert "[[" not in out
    assert LEARNT == "bold green"
    assert "\x1b[1;32myes" in out
    assert "\x1b[2m<|im_start|>user" in out


def test_texts_are_summarised_with_their_classes(texts: Path) -> None:
    text = printed(texts, "classification", SourceConfig())
    assert "for classification of texts" in text
    assert "2: bad 8, good 8" in text
    assert "no row at training.max_length=20" in text
    assert "tokens · " in text


def test_the_kind_is_recognised_by_columns(chats: Path, texts: Path, tmp_path: Path) -> None:
    assert recognise(str(chats), SourceConfig()) == "causal_lm"
    assert recognise(str(texts), SourceConfig()) == "classification"
    assert recognise("builtin", SourceConfig()) == "classification"
    named = SourceConfig(text=("who",), label="who")
    assert recognise(str(chats), named) == "causal_lm"  # its prompts and completions say more
    plain = lines(tmp_path / "plain.jsonl", [{"text": "hello"}])
    assert recognise(str(plain), SourceConfig()) == "causal_lm"
    other = lines(tmp_path / "other.jsonl", [{"question": "a", "answer": "b"}])
    assert (
        recognise(str(other), SourceConfig(prompt="question", completion="answer")) == "causal_lm"
    )
    assert recognise(str(other), SourceConfig(text=("question",), label="answer")) == (
        "classification"
    )
    with refused("neither texts with labels nor conversations found among the columns question"):
        recognise(str(other), SourceConfig())


def test_settings_without_an_effect_are_refused() -> None:
    check_settings(["model=smollm2", "source.label=kind", "training.max_length=64"])
    with refused("rounds does not change what droppeft data shows; it takes model, "):
        check_settings(["rounds=3"])
