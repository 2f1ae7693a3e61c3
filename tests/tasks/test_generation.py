"""Answers are those of the model alone, whatever shares the batch, and end at the end of a turn."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from droppeft.adapters.attach import CAUSAL_LM, attach
from droppeft.config import AdapterConfig
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.layer_dropout import find_blocks
from droppeft.models.packaged import builtin_model_folder
from droppeft.models.precision import hold_in
from droppeft.tasks.generation import GenerationSettings, generate_texts, stop_tokens

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}[unused7]"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ([5000, 6000, 7000], [8000], [9000, 5001, 6001, 7001, 8001], [6002, 7002])
SHORT = GenerationSettings(max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def model_of(positions: int = 64) -> Any:
    """A tiny Llama whose most probable next tokens differ clearly."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        initializer_range=0.5,
        eos_token_id=102,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def by_hand(model: Any, prompt: list[int], new: int) -> list[int]:
    """Greedy continuation without cache, padding and batch."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def adapted(model: Any, **settings: Any) -> Any:
    spec = adapter_spec(AdapterConfig.model_validate(settings), 2)
    wrapped: Any = attach(model, spec, find_blocks(model)[0], 0, task_type=CAUSAL_LM)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.normal_(std=0.5)
    return wrapped


def test_answers_do_not_depend_on_the_batch(tokenizer: Any) -> None:
    model = model_of()
    expected = [tokenizer.decode(by_hand(model, prompt, 6)) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert generate_texts(model, tokenizer, PROMPTS, SHORT) == expected


def test_adapters_take_part(tokenizer: Any) -> None:
    plain = generate_texts(model_of(), tokenizer, PROMPTS, SHORT)
    model = adapted(model_of())
    answers = generate_texts(model, tokenizer, PROMPTS, SHORT)
    assert answers == [
        tokenizer.decode(by_hand(model.get_base_model(), prompt, 6)) for prompt in PROMPTS
    ]
    assert answers != plain


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning"])
def test_virtual_tokens_stand_before_every_prompt(kind: str, tokenizer: Any) -> None:
    """Of one length, since peft counts the positions of padding in a prefix."""
    model = adapted(model_of(), type=kind, tokens=3)
    prompt = list(PROMPTS[0])
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            batch = torch.tensor([ids])
            logits = model.eval()(batch, attention_mask=torch.ones_like(batch)).logits
            ids.append(int(logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[len(prompt) :])
    assert generate_texts(model, tokenizer, [prompt, prompt], SHORT) == [expected, expected]


@pytest.mark.parametrize("kind", ["ln_tuning", "prefix_tuning"])
def test_adapters_in_fp32_fit_to_weights_in_bf16(kind: str, tokenizer: Any) -> None:
    model = model_of()
    hold_in(model, torch.bfloat16)
    assert all(generate_texts(adapted(model, type=kind), tokenizer, PROMPTS, SHORT))


def test_an_answer_ends_before_a_stop_token(tokenizer: Any) -> None:
    model = model_of()
    new = by_hand(model, list(PROMPTS[0]), 6)
    model.generation_config.eos_token_id = [new[3], 102]
    [answer] = generate_texts(model, tokenizer, PROMPTS[:1], SHORT)
    assert answer == tokenizer.decode(new[:3])
    assert model.generation_config.eos_token_id == [new[3], 102]


def test_stop_tokens_come_from_tokenizer_model_and_template(tokenizer: Any) -> None:
    assert stop_tokens(tokenizer) == (102,)
    assert stop_tokens(tokenizer, model_of().generation_config) == (102,)
    with_template = AutoTokenizer.from_pretrained(builtin_model_folder())
    with_template.add_special_tokens({"additional_special_tokens": ["[unused7]"]})
    with_template.eos_token, with_template.chat_template = "[SEP]", TEMPLATE
    end_of_turn = with_template.convert_tokens_to_ids("[unused7]")
    assert stop_tokens(with_template) == tuple(sorted((102, end_of_turn)))


def test_draws_depend_on_the_seed_alone(tokenizer: Any) -> None:
    model = model_of()

    def drawn(seed: int) -> list[str]:
        settings = GenerationSettings(max_new_tokens=6, temperature=2.0, seed=seed)
        return generate_texts(model, tokenizer, PROMPTS, settings)

    state = torch.get_rng_state()
    first = drawn(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert drawn(0) == first
    assert drawn(1) != first
    greedy = GenerationSettings(max_new_tokens=6, temperature=1e-4)
    assert generate_texts(model, tokenizer, PROMPTS, greedy) == generate_texts(
        model, tokenizer, PROMPTS, SHORT
    )


def test_the_model_is_left_as_it_was(tokenizer: Any) -> None:
    model = adapted(model_of()).train()
    model.get_base_model().model.norm.eval()
    modes = [module.training for module in model.modules()]
    own = model.get_base_model().generation_config
    generate_texts(model, tokenizer, PROMPTS, SHORT)
    assert [module.training for module in model.modules()] == modes
    assert model.get_base_model().generation_config is own
    assert tokenizer.padding_side == "right"
    assert model.config.use_cache


def test_prompts_that_do_not_fit_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DroppeftError, match=r"^prompt 2 has no tokens; write some text$"):
        generate_texts(model_of(), tokenizer, [[5000], []], SHORT)
    message = "^prompt 3 has 5 tokens, and an answer may have 6, but the model has positions for 10"
    with pytest.raises(DroppeftError, match=message):
        generate_texts(model_of(10), tokenizer, PROMPTS, SHORT)
    with pytest.raises(DroppeftError, match="makes the token 30522, but the model has embeddings"):
        generate_texts(model_of(), tokenizer, [[5000], [30522]], SHORT)
