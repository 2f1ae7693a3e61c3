"""What a causal language model learns and how it is judged: as transformers does, row by row."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from chat_tokenizer import chat_tokenizer
from chats import ANSWERS, tiny_llama
from droppeft.data.conversation_tokens import (
    IGNORED,
    EncodedText,
    encode_conversations,
    pad_encoded,
)
from droppeft.data.conversations import Conversation, ConversationTable, Document, Message
from droppeft.tasks.causal_lm import CausalLM
from droppeft.tasks.task import BatchResult
from droppeft.training.loop import evaluate

CPU = torch.device("cpu")


def chat(*texts: str) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    return Conversation(tuple(map(Message, roles[: len(texts)], texts)))  # type: ignore[arg-type]


LONG = "what is the answer to this question " * 3
ROWS = (
    *(chat(f"{kind} is it", answer) for kind, answer in ANSWERS.items()),
    chat("hello", "yes", "what is it", "it is a test"),  # both answers are learnt
    chat(LONG, "no"),  # loses a part of its prompt
    chat("test", LONG * 2),  # loses its end
    Document("the world is a test"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def table(tokenizer: Any) -> EncodedText:
    rows = ConversationTable(ROWS, np.zeros(len(ROWS), np.int64))
    encoded = encode_conversations(rows, tokenizer, max_length=40)
    assert (encoded.truncated, encoded.truncated_completions) == (2, 1)
    return encoded


@pytest.fixture(scope="module")
def task(tokenizer: Any) -> CausalLM:
    return CausalLM(("input_ids",), tokenizer.pad_token_id, CPU)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    model = tiny_llama(len(tokenizer), layers=2)
    return model.requires_grad_(False).eval()


def every(table: EncodedText) -> Any:
    return np.arange(len(table), dtype=np.int64)


def test_loss_and_gradient_are_those_of_transformers(
    model: Any, table: EncodedText, task: CausalLM
) -> None:
    weight = model.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    arrays = pad_encoded(table, every(table), task.pad_token_id)
    columns = {name: torch.from_numpy(array) for name, array in arrays.items()}
    theirs = model(**columns).loss
    [their_gradient] = torch.autograd.grad(theirs, weight)
    ours = task.loss(model, task.collate(table, every(table)))
    [our_gradient] = torch.autograd.grad(ours, weight)
    weight.requires_grad_(False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-3, atol=1e-6)


def test_padding_does_not_matter(model: Any, table: EncodedText, task: CausalLM) -> None:
    """A batch of rows of different lengths has the figures of its rows one at a time."""
    batches = [
        evaluate(model, table, every(table), task, batch_size=size) for size in (1, 3, len(table))
    ]
    for found in batches[1:]:
        assert found.metrics == pytest.approx(batches[0].metrics, rel=1e-5)
    assert batches[0].metrics["perplexity"] == pytest.approx(math.exp(batches[0].loss))


def test_each_learnt_token_weighs_the_same(model: Any, table: EncodedText, task: CausalLM) -> None:
    """Also the end of a turn, which is the padding token too."""
    with torch.no_grad():
        alone = [task.evaluate(model, task.collate(table, np.array([n]))) for n in every(table)]
    assert [one.targets for one in alone] == table.targets.tolist()
    found = task.metrics(alone)
    assert found["loss"] == pytest.approx(sum(one.loss_sum for one in alone) / table.targets.sum())
    learnt = table.labels[table.labels != IGNORED]
    ends = sum(len(row.messages) // 2 if isinstance(row, Conversation) else 1 for row in ROWS)
    assert (learnt == task.pad_token_id).sum() == ends - table.truncated_completions


def test_tokens_that_are_predicted_are_counted(
    model: Any, table: EncodedText, task: CausalLM
) -> None:
    arrays = pad_encoded(table, every(table), task.pad_token_id)
    columns = {name: torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        predicted = model(**columns).logits.argmax(dim=-1).numpy()
        batch = task.evaluate(model, task.collate(table, every(table)))
    labels = arrays["labels"][:, 1:]
    expected = (predicted[:, :-1] == labels)[labels != IGNORED]
    assert (batch.observed, batch.targets) == (expected.sum(), expected.size)
    assert task.metrics([batch])["token_accuracy"] == pytest.approx(expected.mean())


@pytest.mark.parametrize(
    ("loss", "perplexity"),
    [(math.log(5), 5.0), (0.0, 1.0), (1e4, math.inf), (math.inf, math.inf), (math.nan, math.nan)],
)
def test_perplexity_of_any_loss(task: CausalLM, loss: float, perplexity: float) -> None:
    found = task.metrics([BatchResult(3 * loss, 2, 1), BatchResult(2 * loss, 3, 1)])
    assert found["loss"] == pytest.approx(loss, nan_ok=True)
    assert found["perplexity"] == pytest.approx(perplexity, nan_ok=True)
    assert found["token_accuracy"] == 0.4
