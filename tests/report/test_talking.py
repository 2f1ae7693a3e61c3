"""Talking to the model of a run, completing files of prompts, and what is exported."""

import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from chats import chat_settings, write_lines
from droppeft.cli import main
from droppeft.config import load_config
from droppeft.data.conversations import Message
from droppeft.errors import DroppeftError
from droppeft.quantities import share
from droppeft.report import talking
from droppeft.report.run_page import write_run_page
from droppeft.report.talking import complete_file, talk
from droppeft.runs.answering import loaded_model
from droppeft.runs.export import export_run, load_source, saved_model
from droppeft.runs.model_cards import adapter_lines
from droppeft.server.run import start_run
from droppeft.tasks.generation import GenerationSettings
from page_reader import check_self_contained
from refusals import refused
from runs import Recorder, rows_of

SHORT = GenerationSettings(max_new_tokens=5, batch_size=3)
PROMPT = [{"role": "user", "content": "what is it"}]
TRAINING = ("training.learning_rate=0.05", "training.local_steps=5", "adapter.targets=all-linear")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return chat_settings(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose model answers otherwise than before."""
    out = tmp_path_factory.mktemp("finished") / "run"
    start_run(load_config(None, [*overrides, *TRAINING]), out, Recorder())
    return out


@pytest.fixture(scope="module")
def bf16(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bf16") / "run"
    more = (
        "training.precision=bf16",
        "rounds=1",
        "evaluation.generated=0",
        "evaluation.personalised=false",
    )
    start_run(load_config(None, [*overrides, *TRAINING, *more]), out, Recorder())
    return out


def answer_of(run: Path, *texts: str, **which: Any) -> str:
    """The answer to the last of messages that alternate between user and model."""
    roles = ("user", "assistant") * len(texts)
    messages = list(map(Message, roles[: len(texts)], texts))  # type: ignore[arg-type]
    with loaded_model(run, SHORT, lambda step: None, **which) as model:
        return model.answers([messages])[0]


# chat


Talk = Callable[..., str]


@pytest.fixture
def talked(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """Say lines to the model, then press Ctrl-D; returns all that was printed."""

    def call(*lines: Any, settings: GenerationSettings = SHORT) -> str:
        left = iter(lines)

        def said(*_: object) -> str:
            line = next(left, EOFError)
            if isinstance(line, type):
                raise line
            return line  # type: ignore[no-any-return]

        monkeypatch.setattr("builtins.input", said)
        console = Console(file=io.StringIO(), width=100)
        talk(finished, settings, console=console)
        return console.file.getvalue() + capsys.readouterr().out  # type: ignore[attr-defined, no-any-return]

    return call


def test_a_conversation_continues_until_an_empty_line(
    talked: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Message]] = []
    real = talking.Answering.answers

    def answers(self: Any, prompts: Sequence[list[Message]], streamer: Any = None) -> list[str]:
        asked.extend(list(prompt) for prompt in prompts)
        return real(self, prompts, streamer)

    monkeypatch.setattr(talking.Answering, "answers", answers)
    printed = talked("one is it", "what", "", "hello")
    assert "Ctrl-D ends" in printed
    assert "A new conversation." in printed
    first, second, third = asked
    assert [message.content for message in first] == ["one is it"]
    assert [message.role for message in second] == ["user", "assistant", "user"]
    assert second[0] == first[0]
    assert second[1].content in printed  # what the model said is shown, and remembered
    assert [message.content for message in third] == ["hello"]


def test_a_run_without_a_finished_round_is_untrained(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stops(Recorder):
        def started(self, about: Any, rows: Any) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        start_run(load_config(None, overrides), tmp_path / "run", Stops())
    console = Console(file=io.StringIO(), width=100)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    talk(tmp_path / "run", SHORT, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "This is the model before training, since no round of the run is finished." in shown


def test_ctrl_d_and_ctrl_c_end_at_the_prompt(talked: Talk) -> None:
    assert "Ctrl-D ends" in talked()
    assert "Ctrl-D ends" in talked(KeyboardInterrupt, "never read")


def test_ctrl_c_ends_an_answer_alone(talked: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def answers(self: Any, prompts: Sequence[list[Message]], streamer: Any = None) -> list[str]:
        asked.append(len(prompts[0]))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return ["fine"]

    monkeypatch.setattr(talking.Answering, "answers", answers)
    talked("first", "second", "third")
    assert asked == [1, 1, 3]  # the message without an answer is forgotten


def test_a_mistake_while_talking_is_one_sentence(
    talked: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(self: Any, prompts: object, streamer: Any = None) -> list[str]:
        raise DroppeftError("the model's chat template refuses this")

    monkeypatch.setattr(talking.Answering, "answers", answers)
    assert "the model's chat template refuses this\n" in talked("first")


def test_too_many_new_tokens_are_refused(finished: Path, talked: Talk) -> None:
    many = GenerationSettings(max_new_tokens=128)
    with refused(r"--max-new-tokens 128 .* the 128 positions of the model.* lower it"):
        talked("first", settings=many)


def test_a_classifier_does_not_talk(whole_run: Path) -> None:
    with refused("task=classification and does not generate text; name a run of task=causal_lm"):
        talk(whole_run, SHORT)


# generate


def test_a_file_is_completed(finished: Path, tmp_path: Path) -> None:
    """One line for each row, in order, with all columns; the answers are those of each alone."""
    prompts = [
        {"prompt": f"{word} is it", "id": n} for n, word in enumerate(("one", "two", "many"))
    ]
    path = write_lines(tmp_path / "prompts.jsonl", [*prompts, {"prompt": "é?", "id": 3}])
    out = complete_file(finished, path, None, SHORT)
    assert out == tmp_path / "prompts-generated.jsonl"
    found = rows_of(out)
    assert [row["id"] for row in found] == [0, 1, 2, 3]
    with loaded_model(finished, SHORT, lambda step: None) as model:
        for row in found:
            [alone] = model.answers([[Message("user", row["prompt"])]])
            assert row["completion"] == alone
    earlier = complete_file(finished, path, tmp_path / "earlier.jsonl", SHORT, round=1)
    assert [row["id"] for row in rows_of(earlier)] == [0, 1, 2, 3]


def test_prompts_may_be_conversations(finished: Path, tmp_path: Path) -> None:
    turns = [*PROMPT, {"role": "assistant", "content": "a test"}, PROMPT[0]]
    path = write_lines(tmp_path / "talks.jsonl", [{"messages": turns}, {"messages": PROMPT}])
    first, second = rows_of(complete_file(finished, path, tmp_path / "new.jsonl", SHORT))
    assert first["completion"] == answer_of(finished, "what is it", "a test", "what is it")
    assert (second["messages"], second["completion"]) == (PROMPT, answer_of(finished, "what is it"))


def test_an_instruction_comes_with_its_input(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "alpaca.csv").write_text("instruction,input\nwhat is it,test\n")
    [row] = rows_of(complete_file(finished, tmp_path / "alpaca.csv", None, SHORT))
    assert row["completion"] == answer_of(finished, "what is it\n\ntest")


BAD_FILES = {
    "no column": (
        '{"words": "a"}',
        r"has no column of prompts \(prompt, messages, conv.*only words",
    ),
    "empty": ("", "has no rows|is empty|cannot be read"),
    "broken": ('{"prompt": ', "line 1 is not valid JSON"),
    "empty prompt": ('{"prompt": "a"}\n{"prompt": " "}', "row 2: prompt is empty"),
    "not text": ('{"prompt": 7}', "row 1: prompt is "),
    "answered": (
        json.dumps({"messages": [*PROMPT, {"role": "assistant", "content": "a"}]}),
        "row 1: messages does not end with a message to answer",
    ),
    "role": (json.dumps({"messages": [{"role": "robot", "content": "a"}]}), "unknown role robot"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_prompts_is_refused(name: str, finished: Path, tmp_path: Path) -> None:
    content, match = BAD_FILES[name]
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with refused(match):
        complete_file(finished, path, None, SHORT)
    assert [one.name for one in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_files_that_exist_or_cannot_be_written_are_refused(finished: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    taken = write_lines(tmp_path / "prompts-generated.jsonl", [])
    with refused("exists already; choose another file with --out"):
        complete_file(finished, path, None, SHORT)
    assert taken.read_text() == ""
    with refused("its folder does not exist; make it, or choose another --out"):
        complete_file(finished, path, tmp_path / "missing" / "out.jsonl", SHORT)
    with refused("no such file"):
        complete_file(finished, tmp_path / "missing.jsonl", None, SHORT)
    with refused("holds no run"):
        complete_file(tmp_path, path, tmp_path / "out.jsonl", SHORT)
    with refused("has no client 9; its clients are 0 to 3"):
        complete_file(finished, path, tmp_path / "out.jsonl", SHORT, client=9)
    assert not (tmp_path / "out.jsonl").exists()


def test_commands_say_what_is_wrong(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    for command in (["chat", tmp_path], ["generate", finished, tmp_path / "missing.csv"]):
        monkeypatch.setattr("sys.argv", ["droppeft", *map(str, command)])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"droppeft: [^\n]*(holds no run|no such file)[^\n]*\n", error)


# Export


def greedy(model: Any, tokenizer: Any) -> str:
    """The answer to PROMPT by transformers alone."""
    inputs = tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.eval().generate(**inputs, max_new_tokens=5, do_sample=False)
    text: str = tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


def test_an_exported_adapter_answers_the_same(
    finished: Path, overrides: list[str], tmp_path: Path
) -> None:
    export_run(finished, tmp_path / "adapter")
    base = overrides[0].removeprefix("model=")
    plain = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = greedy(plain, tokenizer)
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert greedy(model, tokenizer) == answer_of(finished, "what is it") != before


def test_a_merged_model_answers_the_same(finished: Path, tmp_path: Path) -> None:
    export_run(finished, tmp_path / "merged", merge=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert greedy(model, tokenizer) == answer_of(finished, "what is it")


@pytest.mark.full
def test_weights_in_bf16_are_merged_in_fp32(bf16: Path, tmp_path: Path) -> None:
    export_run(bf16, tmp_path / "merged", merge=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_the_lines_of_the_card_load_and_ask_it(finished: Path, tmp_path: Path) -> None:
    for merge in (False, True):
        lines = export_run(finished, tmp_path / f"merge-{merge}", merge=merge).lines
        scope: dict[str, Any] = {}
        exec(lines.replace("…", "what is it").replace("=64", "=5"), scope)
        answer = scope["tokens"][scope["inputs"]["input_ids"].shape[1] :]
        text = scope["tokenizer"].decode(answer, skip_special_tokens=True)
        assert text == answer_of(finished, "what is it")


def test_without_a_chat_template_the_lines_ask_with_a_plain_text(finished: Path) -> None:
    config, checkpoint = saved_model(finished, None, None)
    source = load_source(finished, config, checkpoint, None, False, lambda step: None)
    source.backbone.tokenizer.chat_template = None
    lines = adapter_lines(source, "adapter")
    assert 'inputs = tokenizer("…", return_tensors="pt")\ntokens = ' in lines
    assert "apply_chat_template" not in lines


# The page


def test_the_page_shows_what_the_model_wrote(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    result = json.loads((run / "result.json").read_text())
    samples = rows_of(run / "generated.jsonl")
    samples[0]["after"] = "<script>alert('a')</script>"
    write_lines(run / "generated.jsonl", samples)
    page = write_run_page(run).read_text()
    check_self_contained(page)
    assert "Texts that the model wrote" in page
    assert "&lt;script&gt;alert(&#39;a&#39;)&lt;/script&gt;" in page
    for sample in samples:
        assert sample["prompt"] in page
    assert share(result["generated"]["after"]["chrf"]) in page
    assert f"{result['global_loss']:.3f} nats" in page
    assert "loss, nats" in page  # of the figure
    del result["generated"]
    (run / "result.json").write_text(json.dumps(result))
    assert "Texts that the model wrote" not in write_run_page(run).read_text()
