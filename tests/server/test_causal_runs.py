"""Runs of the task ``causal_lm``: the same identities as those of classification."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from chats import LAYERS, chat_settings, save_chat_model, write_lines
from droppeft.client.run_inputs import clients_of, tokens_of
from droppeft.config import load_config
from droppeft.messages.reply import Update
from droppeft.messages.tensors import flatten
from droppeft.methods import METHODS
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from droppeft.transports.flower.wire_format import (
    RunContext,
    pack_instruction,
    pack_reply,
    unpack_instruction,
    unpack_reply,
)
from refusals import refused
from runs import (
    Recorder,
    adapter_bytes,
    outcome,
    prepared_run,
    rows_of,
    stop_after_a_round,
    update_of,
)

ENOUGH = 10**9
FROZEN = ("frozen.layers=2", "frozen.precision=fp32", "dropout.mean=0")
QUICK = ("evaluation.generated=0", "evaluation.personalised=false")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return chat_settings(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which tests only read."""
    out = tmp_path_factory.mktemp("finished") / "run"
    start_run(load_config(None, overrides), out, Recorder())
    return out


def run(overrides: Sequence[str], out: Path, *more: str) -> dict[str, Any]:
    return start_run(load_config(None, [*overrides, *QUICK, *more]), out, Recorder())


def without_dropout(overrides: Sequence[str], method: str) -> list[str]:
    kept = [one for one in overrides if not one.startswith(("dropout.", "method="))]
    return [*kept, f"method={method}"]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(out / "adapter" / "adapter_model.safetensors")
    return found


# Results


def test_a_result_has_losses_perplexities_and_texts(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert (result["task"], result["metric"], result["classes"]) == ("causal_lm", "loss", 0)
    for when in ("initial", "global"):
        perplexity = np.exp(result[f"{when}_loss"])
        assert result[f"{when}_perplexity"] == pytest.approx(perplexity)
        assert 0 <= result[f"{when}_token_accuracy"] <= 1
    assert result["test_rows"] == 10
    assert result["sampled_test_rows"] == 8
    assert len(result["personalised"]) == 4
    generated = result["generated"]
    samples = rows_of(finished / "generated.jsonl")
    assert (generated["rows"], generated["samples"]) == (2, samples)
    for sample in samples:
        assert sample.keys() == {"prompt", "reference", "before", "after"}
        assert sample["reference"] in ("yes", "no", "hello world")
    for when in ("before", "after"):
        assert all(0 <= generated[when][name] <= 1 for name in ("rouge_l", "chrf", "exact_match"))


@pytest.mark.full
def test_training_lowers_the_loss(overrides: list[str], tmp_path: Path) -> None:
    more = ("training.local_steps=40", "training.learning_rate=0.05", "adapter.targets=all-linear")
    settings = [*without_dropout(overrides, "fedlora"), "rounds=1", "clients=2"]
    result = run(settings, tmp_path / "run", *more)
    assert result["global_loss"] < 0.85 * result["initial_loss"]
    assert result["global_perplexity"] < 0.5 * result["initial_perplexity"]


# Identities


def test_a_drop_rate_of_0_is_full_depth(overrides: list[str], tmp_path: Path) -> None:
    run(without_dropout(overrides, "fedlora"), tmp_path / "whole", "rounds=1")
    run(without_dropout(overrides, "droppeft"), tmp_path / "none", "dropout.mean=0", "rounds=1")
    none, whole = (adapter_bytes(tmp_path / name) for name in ("none", "whole"))
    assert none["adapter_model.safetensors"] == whole["adapter_model.safetensors"]


def test_a_stopped_run_ends_the_same(overrides: list[str], finished: Path, tmp_path: Path) -> None:
    stop_after_a_round(overrides, tmp_path / "run")
    resume_run(tmp_path / "run", Recorder())
    assert outcome(tmp_path / "run") == outcome(finished)
    samples = [(out / "generated.jsonl").read_bytes() for out in (tmp_path / "run", finished)]
    assert samples[0] == samples[1]


def test_cached_states_change_rounding_alone(overrides: list[str], tmp_path: Path) -> None:
    for name, cache in (("with", "true"), ("without", "false")):
        more = (*FROZEN, "rounds=1", "clients=2", f"frozen.cache={cache}")
        run(overrides, tmp_path / name, *more)
    expected = tensors(tmp_path / "with")
    assert {key.split(".layers.")[1][0] for key in expected} == {"2", "3"}
    for key, value in tensors(tmp_path / "without").items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5, msg=key)


def test_all_tokens_can_be_learnt(overrides: list[str]) -> None:
    prepared = prepared_run(*overrides, *FROZEN, "training.loss_on=all")
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    [client, *_] = clients_of(prepared.loaded)
    update = client.run(instruction)
    assert isinstance(update, Update)
    lengths = client.table.lengths[client.rows.train]
    least, most = sorted(lengths)[0] - 1, sorted(lengths)[-1] - 1  # the first one never is
    assert update.examples * least <= update.targets <= update.examples * most


# Weights


def test_clients_are_merged_by_the_tokens_that_they_learnt(
    overrides: list[str], tmp_path: Path
) -> None:
    """One client has short answers and the other long ones, in as many rows."""
    answers = {"short": "yes", "long": "the answer is yes or no " * 2}
    rows = [
        {"prompt": f"what is it {n}", "completion": answers[user], "user": user}
        for n in range(30)
        for user in answers
    ]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    more = ("clients=2", "partition.kind=natural", "partition.key=user", f"data={data}")
    prepared = prepared_run(*without_dropout(overrides, "fedlora"), *more)
    instructions = prepared.method.instruct(prepared.setup, prepared.state, 1, [0, 1])
    clients = clients_of(prepared.loaded)
    updates = [update_of(clients, one) for one in instructions]
    assert updates[0].examples == updates[1].examples == 8
    table = tokens_of(prepared.loaded, prepared.loaded.data.train)
    each = {int(table.targets[client.rows.train[0]]) for client in clients}  # type: ignore[attr-defined]
    assert {update.targets for update in updates} == {8 * targets for targets in each}
    assert len(each) == 2
    state = prepared.method.merge(prepared.setup, prepared.state, 1, updates)
    weights = np.array([update.targets for update in updates], float)
    for key, name, array in flatten(state.model.tensors):
        parts = np.stack([update.tensors[key][name] for update in updates])
        expected = np.average(parts.astype(float), axis=0, weights=weights)
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-7)


# Transports


def test_messages_survive_packing(overrides: list[str]) -> None:
    prepared = prepared_run(*overrides)
    context = RunContext({})
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    packed = pack_instruction(instruction, context)
    received, _ = unpack_instruction(packed)
    clients = clients_of(prepared.loaded)
    update, other = update_of(clients, instruction), update_of(clients, received)
    assert same(update, other)
    reply = unpack_reply(pack_reply(update), ENOUGH)
    assert isinstance(reply, Update)
    assert same(update, reply)
    assert (reply.targets, reply.examples) == (update.targets, 8)


@pytest.mark.full
def test_a_run_over_flower_is_the_same(
    overrides: list[str], finished: Path, tmp_path: Path
) -> None:
    # Other tests may keep the machine busy while the processes of the simulation start.
    words = [*overrides, "transport=flower", "flower.nodes_timeout_s=1800"]
    start_run(load_config(None, words), tmp_path / "run", Recorder())
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished)


def same(one: Update, other: Update) -> bool:
    left, right = list(flatten(one.tensors)), list(flatten(other.tensors))
    return (
        [item[:2] for item in left] == [item[:2] for item in right]
        and all(np.array_equal(a[2], b[2]) for a, b in zip(left, right, strict=True))
        and replace(one, tensors={}, cost=other.cost) == replace(other, tensors={})
    )


# Methods and settings


@pytest.mark.sample("adaptive", "ditto")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_language_model(
    method: str, overrides: list[str], tmp_path: Path
) -> None:
    settings = [*without_dropout(overrides, method), "rounds=1", "evaluation.generated=0"]
    if method == "centralised":
        settings = [one for one in settings if not one.startswith(("clients=", "cohort_size="))]
    if method == "fedadapter":
        settings.append("cohort_size=3")
    result = start_run(load_config(None, settings), tmp_path / "run", Recorder())
    assert np.isfinite(result["personalised_loss"])
    assert result["train_loss"] > 0


@pytest.mark.parametrize(
    "more",
    [
        ("training.precision=bf16", "training.checkpointing=true", "training.loss_on=all"),
        ("sharing.fraction=0.5", "training.precision=bf16"),
    ],
    ids=",".join,
)
def test_settings_that_save_memory(
    more: tuple[str, ...], overrides: list[str], tmp_path: Path
) -> None:
    result = run(overrides, tmp_path / "run", "rounds=1", "clients=2", *more)
    assert np.isfinite(result["global_loss"])
    if "sharing.fraction=0.5" in more:
        for row in rows_of(tmp_path / "run" / "clients.jsonl"):
            assert len(row["shared"]) == LAYERS // 2


# What is refused


def refused_run(overrides: Sequence[str], out: Path, match: str, *more: str) -> None:
    with refused(match):
        start_run(load_config(None, [*overrides, *more]), out, Recorder())
    assert not out.exists()


GOOD = {"prompt": "what is it", "completion": "a test"}
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "empty completion": ({"prompt": "a", "completion": " "}, "row 9: completion is an empty"),
    "no completion": ({"prompt": "a", "completion": None}, "row 9: completion is missing"),
    "other shape": (
        {"messages": [{"role": "user", "content": "a"}]},
        "the row has the shape prompt/completion, and all rows of a file must have the same",
    ),
    "broken line": ('{"prompt": "a", ', r"rows\.jsonl.*"),
    "not an object": ("7", r"rows\.jsonl.*"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(name: str, overrides: list[str], tmp_path: Path) -> None:
    row, match = BAD_ROWS[name]
    path = write_lines(tmp_path / "rows.jsonl", [GOOD] * 8)
    with path.open("a") as file:
        file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    refused_run(overrides, tmp_path / "run", match, f"data={path}")


def test_an_unknown_role_is_named(overrides: list[str], tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [{"role": "robot", "content": "a"}, talk[1]]
    path = write_lines(
        tmp_path / "rows.jsonl", [*({"messages": talk} for _ in range(8)), {"messages": bad}]
    )
    match = "row 9: message 1 of messages has the unknown role robot; known are"
    refused_run(overrides, tmp_path / "run", match, f"data={path}")


def test_a_conversation_needs_a_chat_template(overrides: list[str], tmp_path: Path) -> None:
    """A single prompt with its completion does not."""
    model = save_chat_model(tmp_path / "plain", template=None)
    roles = ("user", "assistant") * 2
    talks = [[{"role": role, "content": f"a test {n}"} for role in roles] for n in range(60)]
    path = write_lines(tmp_path / "rows.jsonl", ({"messages": talk} for talk in talks))
    match = "no chat template, and without one only a prompt with its completion can be learnt"
    refused_run(overrides, tmp_path / "run", match, f"data={path}", f"model={model}")


def test_long_completions_are_cut_and_short_ones_are_kept(
    overrides: list[str], tmp_path: Path
) -> None:
    """A completion longer than the limit loses its end, and the row is still learnt."""
    rows = [{"prompt": f"is it {n}", "completion": "the answer is yes " * 40} for n in range(40)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    result = run(overrides, tmp_path / "run", f"data={path}", "clients=2", "rounds=1")
    assert np.isfinite(result["global_loss"])


def test_tokens_that_the_model_does_not_know_are_refused(
    overrides: list[str], tmp_path: Path
) -> None:
    model = save_chat_model(tmp_path / "small", vocab_size=100)
    match = r"the tokenizer makes the token \d+, but the model has embeddings for 100 tokens only"
    refused_run(overrides, tmp_path / "run", match, f"model={model}")


def test_what_no_task_can_learn_is_refused(overrides: list[str], tmp_path: Path) -> None:
    numbers = tmp_path / "stars.csv"
    numbers.write_text("text,label\n" + "".join(f"it is {n},{n / 7}\n" for n in range(1, 60)))
    many = write_lines(tmp_path / "many.jsonl", [{"text": "a", "label": [1, 2]}] * 20)
    lists = write_lines(tmp_path / "lists.jsonl", [{"text": "a", "labels": [0, 1]}] * 20)
    for path in (many, lists):
        match = f"{path.name}: labels? has type .*; neither regression nor several labels"
        refused_run([], tmp_path / "run", match, f"data={path}")
    match = "stars.csv: label has numbers that are not whole, .* regression is not supported"
    refused_run([], tmp_path / "run", match, f"data={numbers}")


def test_models_that_do_not_generate_are_refused(overrides: list[str], tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    match = "t5 is a sequence-to-sequence model; name a causal language model"
    refused_run(overrides, tmp_path / "run", match, f"model={tmp_path / 't5'}")
    refused_run(overrides, tmp_path / "run", "bert is an encoder", "model=builtin")


def test_settings_of_the_other_task_are_refused(overrides: list[str], tmp_path: Path) -> None:
    for setting in ("training.loss_on=all", "evaluation.generated=0"):
        refused_run([], tmp_path / "run", "has no effect with task=classification", setting)


def test_more_new_tokens_than_positions_are_refused(overrides: list[str], tmp_path: Path) -> None:
    match = "evaluation.max_new_tokens=128 leaves none of the 128 positions"
    more = ("evaluation.generated=2", "evaluation.max_new_tokens=128")
    refused_run(overrides, tmp_path / "run", match, *more)
