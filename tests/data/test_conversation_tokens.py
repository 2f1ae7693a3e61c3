"""Rendering and tokenising conversations: which tokens are learnt, and truncation."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_tokenizer import CHATML, chat_tokenizer
from droppeft.data.conversation_tokens import (
    IGNORED,
    EncodedText,
    encode_conversations,
    encode_prompts,
    pad_encoded,
)
from droppeft.data.conversations import (
    Conversation,
    ConversationTable,
    Document,
    Example,
    Message,
    prompt_of,
)
from droppeft.data.rendering import render_prompts, render_rows
from droppeft.data.tokens import grouped_batches
from refusals import refused

LONG = 10_000

DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>"
    "system\nBe kind<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As SmolLM2's."""

INST = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
"""As Mistral's: no header, and white space between prompt and answer."""

FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last %}<think></think>"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: the last message is rendered differently."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


def chat(*contents: str, first: str = "user") -> Conversation:
    """Messages that alternate between user and assistant."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return Conversation(
        tuple(Message(roles[n % 2], content) for n, content in enumerate(contents))  # type: ignore[arg-type]
    )


def table(*rows: Example) -> ConversationTable:
    return ConversationTable(rows, np.zeros(len(rows), np.int64))


def learnt(encoded: EncodedText, tokenizer: Any, row: int = 0) -> str:
    """The text of the tokens that are learnt."""
    start, end = encoded.offsets[row : row + 2]
    labels = encoded.labels[start:end]
    ids = encoded.row(row)["input_ids"]
    assert np.array_equal(labels[labels != IGNORED], ids[labels != IGNORED])
    return str(tokenizer.decode(labels[labels != IGNORED]))


def whole(encoded: EncodedText, tokenizer: Any, row: int = 0) -> str:
    return str(tokenizer.decode(encoded.row(row)["input_ids"]))


# What is learnt


def test_every_answer_is_learnt_with_the_token_that_ends_its_turn(tokenizer: Any) -> None:
    row = chat("hello", "yes", "what", "no", "the")
    encoded = encode_conversations(table(row), tokenizer, LONG)
    assert learnt(encoded, tokenizer) == "yes<|im_end|>\nno<|im_end|>\n"
    assert whole(encoded, tokenizer) == tokenizer.apply_chat_template(
        [vars(message) for message in row.messages], tokenize=False
    )
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # and yet it is learnt
    assert np.sum(encoded.labels == tokenizer.eos_token_id) == 2
    assert encoded.targets.tolist() == [np.sum(encoded.labels != IGNORED)]


def test_an_answer_that_occurs_in_its_prompt_is_learnt_once(tokenizer: Any) -> None:
    encoded = encode_conversations(table(chat("yes<|im_end|>\nyes", "yes")), tokenizer, LONG)
    assert learnt(encoded, tokenizer) == "yes<|im_end|>\n"


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM])
def test_the_assistant_may_speak_first(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    row = chat("hello", "is it?", "yes", first="assistant")
    encoded = encode_conversations(table(row), tokenizer, LONG)
    assert learnt(encoded, tokenizer) == "hello<|im_end|>\nyes<|im_end|>\n"


def test_all_tokens_but_the_first_can_be_learnt(tokenizer: Any) -> None:
    encoded = encode_conversations(table(chat("hello", "yes")), tokenizer, LONG, "all")
    assert encoded.labels[0] == IGNORED
    assert np.array_equal(encoded.labels[1:], encoded.columns["input_ids"][1:])


def test_a_template_without_a_header(tokenizer: Any) -> None:
    inst = chat_tokenizer(INST)
    encoded = encode_conversations(table(chat("hello", "yes", "what", "no")), inst, LONG)
    assert learnt(encoded, inst) == " yes<|im_end|> no<|im_end|>"
    assert whole(encoded, inst).startswith("<s>[INST] hello [/INST] yes")


@pytest.mark.parametrize(("bos", "beginning"), [(False, ""), (True, "<s>")])
def test_without_a_template_prompt_and_completion_are_joined(bos: bool, beginning: str) -> None:
    plain = chat_tokenizer(None, bos=bos)
    rows = table(chat("question: what?  ", "yes"), Document("hello world"))
    encoded = encode_conversations(rows, plain, LONG)
    assert whole(encoded, plain) == f"{beginning}question: what?  yes<|im_end|>"
    assert learnt(encoded, plain) == "yes<|im_end|>"
    assert whole(encoded, plain, 1) == f"{beginning}hello world<|im_end|>"
    # The first token of a row is never predicted.
    assert learnt(encoded, plain, 1).endswith(" world<|im_end|>")
    assert int(encoded.targets[1]) == encoded.lengths[1] - 1


def test_a_document_does_not_use_the_template(tokenizer: Any) -> None:
    rows = table(chat("hello", "yes"), Document("the answer"), chat("what", "no"))
    encoded = encode_conversations(rows, tokenizer, LONG)
    assert whole(encoded, tokenizer, 1) == "the answer<|im_end|>"
    assert learnt(encoded, tokenizer, 2) == "no<|im_end|>\n"


# The same tokens as in generation


def prefix_by_prefix(row: Conversation, tokenizer: Any) -> list[int]:
    """Lengths of the prompt and of the turn for each answer, each tokenised on its own."""
    ends = []
    for number, message in enumerate(row.messages):
        if message.role == "assistant":
            before, turn = ([vars(one) for one in row.messages[:n]] for n in (number, number + 1))
            for messages, header in ((before, True), (turn, False)):
                ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=header, return_dict=False
                )
                ends.append(len(ids))
    return ends


WORDS = st.text(alphabet="ab \n\té😀?:)<|_'1", max_size=8)


@pytest.mark.parametrize("template", [CHATML, INST], ids=["chatml", "inst"])
@given(contents=st.lists(st.tuples(WORDS, WORDS.filter(str.strip)), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_spans_are_those_of_tokenising_each_prefix(
    template: str, contents: list[tuple[str, str]]
) -> None:
    tokenizer = TOKENIZERS[template]
    row = chat(*(text for turn in contents for text in turn))
    encoded = encode_conversations(table(row), tokenizer, LONG)
    ids = encoded.columns["input_ids"]
    [rendered] = render_rows([row], tokenizer)
    spans = [rendered.text[start:end] for start, end in rendered.spans]
    assert learnt(encoded, tokenizer) == "".join(spans)
    if template == CHATML and not any(answer[0].isspace() for _, answer in contents):
        changes = np.flatnonzero(np.diff(np.r_[False, encoded.labels != IGNORED, False]))
        assert changes.tolist() == prefix_by_prefix(row, tokenizer)
    [prompt] = encode_prompts([row.messages[:1]], tokenizer, LONG)
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.labels[len(prompt)] != IGNORED
    assert tokenizer.decode(ids) == rendered.text


TOKENIZERS = {template: chat_tokenizer(template) for template in (CHATML, INST)}


@pytest.mark.parametrize("completion", [" yes", "\n\nyes", "  yes", "yes", "\tyes", "\n def"])
@pytest.mark.parametrize("prompt", ["answer:", "answer: ", "answer:\n", "answer:\n\n", "answer:  "])
def test_no_token_reaches_from_the_prompt_into_the_completion(prompt: str, completion: str) -> None:
    plain = chat_tokenizer(None)
    encoded = encode_conversations(table(chat(prompt, completion)), plain, LONG)
    [alone] = encode_prompts([chat(prompt).messages], plain, LONG)
    assert encoded.columns["input_ids"][: len(alone)].tolist() == alone.tolist()
    assert learnt(encoded, plain) == f"{completion}<|im_end|>"
    assert whole(encoded, plain) == f"{prompt}{completion}<|im_end|>"


def test_prompts_end_with_the_header_of_the_assistant(tokenizer: Any) -> None:
    row = chat("hello", "yes", "what", "no")
    asked = [prompt_of(row), prompt_of(Document("x")), row.messages[:1]]
    [long, none, short] = encode_prompts(asked, tokenizer, LONG)
    assert tokenizer.decode(long).endswith("what<|im_end|>\n<|im_start|>assistant\n")
    assert none.size == 0
    assert tokenizer.decode(short) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompts([()], chat_tokenizer(None, bos=True)) == ["<s>"]


# Truncation


def test_a_long_prompt_loses_its_middle(tokenizer: Any) -> None:
    words = " ".join(f"{number}" for number in range(200))
    rows = table(chat(words, "yes"), chat("hello", "yes"))
    full = encode_conversations(rows, tokenizer, LONG)
    cut = encode_conversations(rows, tokenizer, 60)
    assert cut.lengths.tolist() == [60, full.lengths[1]]
    assert cut.full_lengths.tolist() == full.lengths.tolist()
    assert (cut.truncated, cut.truncated_completions) == (1, 0)
    assert learnt(cut, tokenizer) == "yes<|im_end|>\n"
    text = whole(cut, tokenizer)
    assert text.startswith("<|im_start|>user\n0 1 2 3")
    assert text.endswith(" 199<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n")
    [prompt] = encode_prompts([rows.rows[0].messages[:1]], tokenizer, 20)  # type: ignore[union-attr]
    assert tokenizer.decode(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert len(prompt) == 20


def test_a_long_completion_loses_its_end(tokenizer: Any) -> None:
    words = " ".join(f"{number}" for number in range(200))
    cut = encode_conversations(table(chat(words, words)), tokenizer, 80)
    assert cut.lengths.tolist() == [80]
    assert cut.truncated_completions == cut.truncated == 1
    assert cut.targets.tolist() == [60]  # the prompt keeps a fourth
    assert learnt(cut, tokenizer).startswith("0 1 2 3")
    assert "<|im_end|>" not in learnt(cut, tokenizer)
    assert whole(cut, tokenizer).startswith("<|im_start|>user\n0")


@pytest.mark.parametrize("max_length", [4, 5, 7, 30])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_every_row_keeps_something_to_learn(tokenizer: Any, max_length: int, loss_on: Any) -> None:
    rows = table(
        chat("what " * 50, "yes"), chat("what", "yes " * 50), chat("a", "b", "c" * 90, "d"),
        Document("hello " * 50), chat("", "yes"),
    )  # fmt: skip
    encoded = encode_conversations(rows, tokenizer, max_length, loss_on)
    assert encoded.lengths.max() <= max_length
    assert encoded.targets.min() >= 1
    assert np.sum(encoded.targets) == np.sum(encoded.labels != IGNORED)


# Batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_not_learnt_even_if_it_is_the_end_of_text(tokenizer: Any, side: Any) -> None:
    rows = table(chat("hello", "yes"), chat("what is the answer", "no it is a test"))
    encoded = encode_conversations(rows, tokenizer, LONG)
    batch = pad_encoded(encoded, np.array([1, 0]), tokenizer.pad_token_id, side)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, int(encoded.lengths.max()))
    )
    padded = batch["attention_mask"] == 0
    assert np.all(batch["input_ids"][padded] == tokenizer.eos_token_id)
    assert np.all(batch["labels"][padded] == IGNORED)
    for place, row in enumerate((1, 0)):
        start, end = encoded.offsets[row : row + 2]
        assert batch["labels"][place][~padded[place]].tolist() == encoded.labels[start:end].tolist()
    assert padded.sum(1).tolist() == [0, int(encoded.lengths[1] - encoded.lengths[0])]


def test_rows_are_batched_by_length(tokenizer: Any) -> None:
    rows = table(*(chat("what " * (n + 1), "yes") for n in range(6)))
    encoded = encode_conversations(rows, tokenizer, LONG)
    batches = grouped_batches(np.arange(6), encoded.lengths, 2, np.random.default_rng(0))
    assert sorted(tuple(sorted(batch.tolist())) for batch in batches) == [(0, 1), (2, 3), (4, 5)]


# What is refused


def test_without_a_template_a_longer_conversation_is_refused() -> None:
    plain = chat_tokenizer(None)
    with refused(
        "has no chat template.*not the conversation that begins with 'hello' with the roles user, "
        "assistant, user, assistant; use"
    ):
        encode_conversations(table(chat("hello", "yes", "what", "no")), plain, LONG)
    with refused("has no chat template"):
        encode_prompts([chat("hello", "yes", "what").messages], plain, LONG)


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    forgetful = chat_tokenizer(FORGETFUL)
    with refused("renders the beginning of the conversation that begins with 'hello' differently"):
        encode_conversations(table(chat("hello", "yes", "what", "no")), forgetful, LONG)


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    inst = chat_tokenizer(INST)
    system = Conversation((Message("system", "Be  kind " * 9), *chat("a", "b").messages))
    with refused(
        "refuses the conversation that begins with 'Be kind Be kind Be kind Be kind Be kind …': "
        "only user and assistant; change"
    ):
        encode_conversations(table(chat("hello", "yes"), system), inst, LONG)


def test_a_tokenizer_without_an_end_of_text_is_refused() -> None:
    with refused("no end-of-text token"):
        encode_conversations(table(Document("a")), chat_tokenizer(None, eos=None), LONG)


def test_a_slow_tokenizer_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with refused("has no fast version"):
        encode_conversations(table(chat("a", "b")), tokenizer, LONG)


def test_the_date_in_a_template_does_not_change() -> None:
    dated = chat_tokenizer("{{ date_string or strftime_now('%d %b %Y') }}" + CHATML)
    assert render_prompts([chat("a").messages], dated)[0].startswith("26 Jul 2024<|im_start|>")
