"""What the page of a model does with texts and with a chat; the page itself needs gradio."""

import threading
from pathlib import Path

import pytest

from chats import chat_settings
from droppeft.config import load_config
from droppeft.data.conversations import Message
from droppeft.results import Result
from droppeft.runs.answering import loaded_model
from droppeft.runs.predicting import load_predictor
from droppeft.runs.streaming import stream_answer
from droppeft.server.run import start_run
from droppeft.tasks.generation import GenerationSettings
from droppeft.ui.model_page import measured, messages_of, probabilities, text_labels, title_of
from refusals import refused
from runs import Recorder

TEXT = "planet star moon"


def test_a_text_gets_the_probabilities_that_predict_gives(whole_run: Path) -> None:
    result = Result(whole_run)
    predictor = load_predictor(whole_run, lambda step: None)
    found = probabilities(predictor, [TEXT])
    expected = result.predict([TEXT], probabilities=True).iloc[0].to_dict()
    assert found == pytest.approx(expected)
    assert text_labels(whole_run) == ("text",)
    assert title_of(whole_run, 3, None).startswith("## Global model after round 3\n")
    assert "on 60 test texts" in measured(predictor)
    with refused("the text is empty"):
        probabilities(predictor, ["  "])


def test_an_answer_is_streamed_and_can_be_stopped(tmp_path: Path) -> None:
    overrides = [*chat_settings(tmp_path), "rounds=1", "evaluation.personalised=false"]
    start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    messages = [Message("user", "what is it")]
    with loaded_model(tmp_path / "run", GenerationSettings(40), lambda step: None) as model:
        *parts, whole = stream_answer(model, messages)
        assert [whole] == model.answers([messages])
        assert parts == sorted(parts, key=len)
        before = threading.active_count()
        stream = stream_answer(model, messages)
        next(stream)
        assert threading.active_count() == before + 1
        stream.close()
        assert threading.active_count() == before
        with refused("positions of the model"):
            model.with_settings(GenerationSettings(1000))


def test_a_history_has_texts_or_lists_of_parts() -> None:
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    assert messages_of(history) == [Message("user", "one"), Message("assistant", "two")]
