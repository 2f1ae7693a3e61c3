"""Let a causal language model answer prompts, by transformers' ``generate``; ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from droppeft.data.conversation_tokens import encode_prompts
from droppeft.data.conversations import Message
from droppeft.errors import DroppeftError
from droppeft.models.evaluation_mode import evaluating
from droppeft.models.key_value_cache import set_temporarily
from droppeft.models.loading import check_tokens, most_tokens
from droppeft.models.precision import HALF, autocast

_ANSWER = "droppeft"


@dataclass(frozen=True)
class GenerationSettings:
    """How texts are generated.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: 0 takes the most probable token at each step. Otherwise tokens are drawn, with
            logits divided by it.
        top_p: drawn tokens are among the most probable ones that have this probability together.
        seed: of the draws. Answers also depend on which prompts share a batch.
        batch_size: number of prompts that are answered at once.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8


def complete_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    max_length: int,
    settings: GenerationSettings,
    streamer: Any = None,
) -> list[str]:
    """Return the model's answer to each prompt, rendered with its chat template.

    Args:
        model, tokenizer, settings, streamer: as in :func:`generate_texts`.
        prompts: messages, of which the last is not the assistant's.
        max_length: longest prompt in tokens, if the model has positions for it and the answer; of
            a longer one the middle is left out.

    Raises:
        DroppeftError: the chat template refuses a prompt, or as :func:`generate_texts`.
    """
    most = min(max_length, most_tokens(model) - settings.max_new_tokens)
    ids = encode_prompts(prompts, tokenizer, most)
    return generate_texts(model, tokenizer, [one.tolist() for one in ids], settings, streamer)


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    streamer: Any = None,
) -> list[str]:
    """Return the model's answer to each prompt, without the prompt and special tokens.

    An answer ends before an end-of-text or end-of-turn token. All layers run. The model's training
    modes and generation settings are restored.

    Args:
        model: a causal language model of transformers, also with an adapter of peft.
        tokenizer: that of the model.
        prompts: token ids, as :func:`~droppeft.data.conversation_tokens.encode_prompts` returns
            them.
        settings: how texts are generated.
        streamer: a streamer of transformers that shows the answer to a single prompt as it is
            generated, or ``None``.

    Raises:
        DroppeftError: a prompt is empty or has a token that the model does not know, or there are
            too few positions for prompt and answer.
    """
    _check_lengths(model, prompts, settings.max_new_tokens)
    check_tokens(model, max((max(prompt) for prompt in prompts), default=0))
    device = next(model.parameters()).device
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = _config(tokenizer, causal.generation_config, settings)
    texts = [""] * len(prompts)
    # Prompts of similar length share a batch.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with (
        evaluating(model),
        set_temporarily(causal, "generation_config", config),
        autocast(_precision(model), device),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.no_grad(),
    ):
        torch.manual_seed(settings.seed)
        for start in range(0, len(order), settings.batch_size):
            chosen = order[start : start + settings.batch_size]
            inputs = _left_padded([prompts[index] for index in chosen], config.pad_token_id, device)
            output = model.generate(**inputs, streamer=streamer)
            answers = output[:, inputs["input_ids"].shape[1] :].tolist()
            for index, answer in zip(chosen, answers, strict=True):
                texts[index] = tokenizer.decode(_cut(answer, config), skip_special_tokens=True)
    return texts


def _precision(model: nn.Module) -> str:
    """The precision in which a model's weights are held, so that adapters in fp32 fit to them."""
    held = {value.dtype for value in model.parameters()}
    return next((name for name, dtype in HALF.items() if dtype in held), "fp32")


def stop_tokens(tokenizer: Any, of_model: Any = None) -> tuple[int, ...]:
    """Return the ids of the tokens that end an answer, in order.

    They are the tokenizer's end-of-text token, those of the model's generation settings, and the
    token with which the chat template ends a turn of the assistant.

    Args:
        tokenizer: that of the model.
        of_model: the model's ``generation_config``.
    """
    of_config = getattr(of_model, "eos_token_id", None)
    several = of_config if isinstance(of_config, list) else [of_config]
    found = {tokenizer.eos_token_id, *several, _end_of_turn(tokenizer)}
    return tuple(sorted(token for token in found if token is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The first added token after an answer, as the chat template renders it."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    after = tokenizer(rendered.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return next((token for token in after if token in added), None)


def _config(tokenizer: Any, of_model: Any, settings: GenerationSettings) -> Any:
    """Settings that are used instead of the model's own, which may sample or penalise."""
    drawn = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        eos_token_id=list(stop_tokens(tokenizer, of_model)) or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **(drawn if settings.temperature > 0 else {}),
    )


def _check_lengths(model: nn.Module, prompts: Sequence[Sequence[int]], new: int) -> None:
    most = most_tokens(model)
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DroppeftError(f"prompt {number} has no tokens; write some text")
        if len(prompt) + new > most:
            raise DroppeftError(
                f"prompt {number} has {len(prompt)} tokens, and an answer may have {new}, but the "
                f"model has positions for {most} only; shorten the prompt or lower max_new_tokens"
            )


def _left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Token ids and attention mask (B, S); every prompt ends where its answer begins."""
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    ids = [[pad] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _cut(answer: list[int], config: Any) -> list[int]:
    """The answer up to its first stop token."""
    stops = config.eos_token_id or []
    end = next((place for place, token in enumerate(answer) if token in stops), len(answer))
    return answer[:end]
