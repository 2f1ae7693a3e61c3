"""Texts that clients' own models write on the clients' own test rows, and their scores."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from chats import SETTINGS, save_chat_model, write_lines
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config
from droppeft.data.conversations import Message
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction, TextGeneration
from droppeft.messages.reply import EvaluationReply
from droppeft.runs.answering import loaded_model
from droppeft.server.client_evaluation import ClientEvaluation, evaluate_clients, summarise_clients
from droppeft.server.prepare import Prepared
from droppeft.server.run import start_run
from droppeft.tasks.generation import GenerationSettings, complete_prompts, generate_texts
from droppeft.tasks.metrics import LOSS, TEXT_METRICS
from droppeft.tasks.text_metrics import text_scores
from droppeft.transports.flower.wire_format import (
    RunContext,
    pack_instruction,
    pack_reply,
    unpack_instruction,
    unpack_reply,
)
from handmade import Scripted
from refusals import refused
from runs import Recorder, prepared_run, timeless

ENOUGH = 10**9
ASKED = "evaluation.personalised_generated=3"
ROWS, LENGTH, NEW = 3, 48, 4
"""Texts of a client, longest prompt and most new tokens, as in the settings."""

SHORT = GenerationSettings(max_new_tokens=NEW)
SCORES = [metric.key("personalised") for metric in TEXT_METRICS.values()]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run in which every second reference is what the model writes before training."""
    folder = tmp_path_factory.mktemp("texts")
    path = save_chat_model(folder / "model")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    questions = [f"what is it {number} answer" for number in range(60)]
    prompts = [[Message("user", question)] for question in questions]
    answers = complete_prompts(model, tokenizer, prompts, LENGTH, SHORT)
    assert all(answer.strip() for answer in answers)
    rows = [
        {"prompt": question, "completion": answer if number % 2 else "yes"}
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    data = write_lines(folder / "rows.jsonl", rows)
    kept = (
        one for one in SETTINGS if not one.startswith(("method=", "dropout.", "evaluation.gen"))
    )
    return [f"model={path}", f"data={data}", *kept, "evaluation.generated=0", "method=fedlora"]


@pytest.fixture(scope="module")
def prepared(overrides: list[str]) -> Prepared:
    return prepared_run(*overrides, ASKED)


def asking(prepared: Prepared, client: int) -> Instruction:
    """The instruction to evaluate the model before training, and to let it write texts."""
    instruction = prepared.method.evaluate_client(prepared.setup, prepared.state, 1, client)
    return replace(instruction, generation=TextGeneration(ROWS, LENGTH, NEW))


def reply_of(prepared: Prepared, client: int) -> EvaluationReply:
    reply = clients_of(prepared.loaded)[client].run(asking(prepared, client))
    assert isinstance(reply, EvaluationReply)
    return reply


def scores_in(metrics: Any) -> dict[str, float]:
    return {name: metrics[name] for name in TEXT_METRICS}


def own_rows(prepared: Prepared, client: int) -> list[Any]:
    """The first test rows of a client, as conversations."""
    chosen = prepared.loaded.clients[client].test[:ROWS]
    return [prepared.loaded.data.train.rows[row] for row in chosen]


# The client


def test_scores_are_those_of_texts_on_the_client_s_own_rows(prepared: Prepared) -> None:
    """Each prompt is rendered, tokenised and answered here by hand."""
    tokenizer, matches = prepared.loaded.backbone.tokenizer, []
    for client in range(4):
        reply, rows = reply_of(prepared, client), own_rows(prepared, client)
        prompts = []
        for row in rows:
            turns = [{"role": "user", "content": row.messages[0].content}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        texts = generate_texts(prepared.model.model, tokenizer, prompts, SHORT)
        expected = text_scores(texts, [row.messages[1].content for row in rows])
        assert reply.texts == len(rows) > 0
        assert scores_in(reply.metrics) == asdict(expected)
        matches.append(expected.exact_match)
    assert 0 < fmean(matches) < 1


def test_all_tokens_may_be_learnt(overrides: list[str], prepared: Prepared) -> None:
    """What a prompt is does not depend on what is learnt."""
    every = prepared_run(*overrides, ASKED, "training.loss_on=all")
    expected = scores_in(reply_of(prepared, 1).metrics)
    assert scores_in(reply_of(every, 1).metrics) == expected


def test_scores_survive_packing_and_texts_stay_on_the_client(prepared: Prepared) -> None:
    instruction = asking(prepared, 0)
    packed = pack_instruction(instruction, RunContext({}))
    received, _ = unpack_instruction(packed)
    assert received.generation == TextGeneration(ROWS, LENGTH, NEW)
    client = clients_of(prepared.loaded)[0]
    reply = client.run(received)
    assert reply == client.run(instruction)
    sent = pack_reply(reply)
    assert unpack_reply(sent, ENOUGH) == reply
    assert isinstance(reply, EvaluationReply)
    assert reply.texts > 0
    evaluation = json.loads(sent.head)["evaluation"]
    assert evaluation.keys() == {"round", "client", "nonce", "rows", "metrics", "texts"}
    assert {type(value) for value in evaluation["metrics"].values()} == {float}


def test_texts_without_prompts_have_no_scores(overrides: list[str], tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", [{"text": f"it is a test {n}"} for n in range(60)])
    prepared = prepared_run(*overrides, ASKED, f"data={data}")
    reply = reply_of(prepared, 0)
    assert reply.texts == 0
    assert reply.metrics.keys() == {"loss", "perplexity", "token_accuracy"}


def test_a_classifier_that_is_asked_for_texts_says_why_not(
    prepare_with: Callable[..., Prepared],
) -> None:
    prepared = prepare_with()
    with pytest.raises(DroppeftError, match="client 1 is asked for texts, but its task generates"):
        clients_of(prepared.loaded)[1].run(asking(prepared, 1))


# The server

QUALITY = {"loss": 1.0, "perplexity": 2.7, "token_accuracy": 0.5}
GOOD = {"rouge_l": 1.0, "chrf": 0.5, "exact_match": 0.0}


def measurement(instruction: Instruction) -> EvaluationReply:
    about = (instruction.round, instruction.client, instruction.nonce)
    return EvaluationReply(*about, rows=3, metrics={**QUALITY, **GOOD}, texts=2)


def measurements(instruction: Instruction) -> list[Any]:
    """Client 0 and client 8, which has no prompts, send what is possible."""
    good = measurement(instruction)
    others = {
        1: replace(good, texts=4, rows=9),
        2: replace(good, texts=-1),
        3: replace(good, texts=3, rows=2),
        4: replace(good, metrics={**QUALITY, **GOOD, "rouge_l": 1.5}),
        5: replace(good, metrics={**QUALITY, **GOOD, "chrf": float("nan")}),
        6: replace(good, metrics=QUALITY),
        7: replace(good, texts=0),
        8: replace(good, texts=0, metrics=QUALITY),
    }
    return [others.get(instruction.client, good)]


def test_wrong_scores_are_refused(overrides: list[str]) -> None:
    prepared = prepared_run(*overrides, ASKED, "clients=9", "cohort_size=9", "partition.min_rows=5")
    evaluation = evaluate_clients(
        prepared.setup, prepared.method, Scripted(measurements), prepared.state, 4
    )
    assert [each.client for each in evaluation.measurements] == [0, 8]
    claims = "refused: claims {} texts on {} rows, at most 3 were asked for"
    assert {failure.client: failure.reason for failure in evaluation.failures} == {
        **{1: claims.format(4, 9), 2: claims.format(-1, 3), 3: claims.format(3, 2)},
        **dict.fromkeys(range(4, 8), "refused: its measurement has impossible values"),
    }


def test_scores_that_were_not_asked_for_are_refused(prepared: Prepared) -> None:
    config = prepared.setup.config
    silent = config.evaluation.model_copy(update={"personalised_generated": 0})
    setup = replace(prepared.setup, config=config.model_copy(update={"evaluation": silent}))
    transport = Scripted(lambda instruction: [measurement(instruction)])
    evaluation = evaluate_clients(setup, prepared.method, transport, prepared.state, 4)
    assert evaluation.measurements == ()
    reason = "refused: claims 2 texts on 3 rows, at most 0 were asked for"
    assert {failure.reason for failure in evaluation.failures} == {reason}


def test_means_are_over_the_clients_that_wrote_texts() -> None:
    def measured(client: int, texts: int, scores: dict[str, float]) -> EvaluationReply:
        return EvaluationReply(1, client, "", 8, {**QUALITY, **scores}, texts)

    replies = (
        measured(0, 5, {"rouge_l": 0.25, "chrf": 0.5, "exact_match": 0.0}),
        measured(1, 0, {}),
        measured(2, 1, {"rouge_l": 0.75, "chrf": 0.25, "exact_match": 1.0}),
    )
    sums = summarise_clients(ClientEvaluation(replies, (), 0.0), {}, LOSS)
    assert [sums[key] for key in SCORES] == [0.5, 0.375, 0.5]
    assert [one.get("texts") for one in sums["personalised"]] == [5, None, 1]
    without = summarise_clients(ClientEvaluation(replies[1:2], (), 0.0), {}, LOSS)
    assert [without[key] for key in SCORES] == [None] * 3


# Whole runs


@pytest.mark.parametrize(
    "method", [("method=local",), ("method=droppeft", "sharing.fraction=0.5")], ids="-".join
)
def test_a_run_has_scores_of_the_model_of_each_client(
    method: tuple[str, ...], overrides: list[str], tmp_path: Path
) -> None:
    """They are those of the model that ``droppeft chat RUN --client`` talks with."""
    settings = [*overrides, *method, ASKED, "clients=2", "rounds=1", "training.learning_rate=0.05"]
    out = tmp_path / "run"
    result = start_run(load_config(None, settings), out, Recorder())
    prepared = prepared_run(*settings)
    for client in range(2):
        rows = own_rows(prepared, client)
        with loaded_model(out, SHORT, lambda step: None, client=client) as model:
            texts = model.answers([row.messages[:1] for row in rows])
        expected = text_scores(texts, [row.messages[1].content for row in rows])
        entry = result["personalised"][client]
        assert entry["texts"] == len(rows)
        assert scores_in(entry) == asdict(expected)
    for name, key in zip(TEXT_METRICS, SCORES, strict=True):
        assert result[key] == fmean(one[name] for one in result["personalised"])
    assert "generated" not in result


def test_without_them_a_run_is_the_same(overrides: list[str], tmp_path: Path) -> None:
    results = []
    for number, more in enumerate([(), (ASKED,)]):
        settings = [*overrides, "method=local", "clients=2", "rounds=1", *more]
        result = start_run(load_config(None, settings), tmp_path / f"{number}", Recorder())
        results.append(timeless(result))
    plain, scored = results
    assert [plain[key] for key in SCORES] == [None] * 3
    assert None not in [scored[key] for key in SCORES]
    for one in scored["personalised"]:
        for name in ("texts", *TEXT_METRICS):
            del one[name]
    different = {key for key in scored if scored[key] != plain[key]}
    assert different == {"config", *SCORES}


# What is refused


def refused_run(overrides: Sequence[str], out: Path, match: str, *more: str) -> None:
    with refused(match):
        start_run(load_config(None, [*overrides, *more]), out, Recorder())
    assert not out.exists()


def test_answers_that_leave_no_room_for_a_prompt_are_refused(
    overrides: list[str], tmp_path: Path
) -> None:
    match = (
        "evaluation.max_new_tokens=128 leaves none of the 128 positions .*; lower it, or set "
        "evaluation.personalised_generated=0$"
    )
    refused_run(overrides, tmp_path / "run", match, ASKED, "evaluation.max_new_tokens=128")


@pytest.fixture
def without_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "sacrebleu" else real(name, package),
    )


@pytest.mark.usefixtures("without_sacrebleu")
@pytest.mark.parametrize("setting", ["generated", "personalised_generated"])
def test_a_missing_package_is_named_before_anything_is_trained(
    setting: str, overrides: list[str], tmp_path: Path
) -> None:
    match = (
        rf"evaluation\.{setting} needs the package sacrebleu; run: pip install "
        r"'droppeft\[llm\]'"
    )
    asked = ("evaluation.generated=0", f"evaluation.{setting}=2")
    refused_run(overrides, tmp_path / "run", match, *asked)


@pytest.mark.usefixtures("without_sacrebleu")
def test_a_run_that_writes_no_texts_does_without_the_package(overrides: list[str]) -> None:
    """Without a global model there is none that could write them."""
    prepared_run(*overrides, "evaluation.generated=2", "method=local")
