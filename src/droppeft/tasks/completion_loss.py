"""The loss of a causal language model at the tokens that it has to learn, and nowhere else.

The head is the largest matrix product of a small language model: its logits have one value per
token and entry of the vocabulary. Here it is applied to the hidden states whose next token is
supervised, a few at a time, so that no tensor of shape (B, S, V) exists. Values and gradients are
those of transformers' ``labels=``, up to rounding.

The idea of computing the gradient with respect to the hidden states in the forward pass is from
Liger Kernel (arXiv:2410.10989); the code is ours. The model's own forward applies the head, so that
scaled or capped logits (Cohere, Gemma 2, Granite) need no code of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPast

from droppeft.errors import DroppeftError
from droppeft.models.key_value_cache import set_temporarily

IGNORED = -100
"""The label of tokens that are not learnt, as in transformers."""

LOGITS_AT_ONCE = 2**23
"""Largest number of logits that exist at a time: 34 MB in fp32, or 170 tokens of a vocabulary of
49,152. Larger numbers are not faster on a CPU."""


@dataclass(frozen=True)
class CompletionLoss:
    """The loss of a batch.

    Attributes:
        loss: sum of the cross-entropies in nats, a scalar in fp32. Its backward pass gives the
            gradients; divide by ``targets`` for the mean, and take the exponential of the mean for
            the perplexity.
        targets: number of supervised tokens.
        correct: number of supervised tokens to which the model gives the highest probability, a
            scalar.
    """

    loss: torch.Tensor
    targets: int
    correct: torch.Tensor


def completion_loss(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor
) -> CompletionLoss:
    """Run a causal language model and return the loss of its supervised tokens.

    It works under autocast, with gradient checkpointing of the blocks, with layers dropped, and
    without gradients. The head gets no gradient: like everything but the adapters it is frozen.

    Args:
        model: a causal language model of transformers, also with an adapter of peft.
        inputs: what the model is called with, without labels: ``input_ids`` (B, S) and usually
            ``attention_mask`` (B, S).
        labels: (B, S), int64. Each is the token at its own position or :data:`IGNORED`, unshifted
            as transformers takes them: the state at position s is compared with the label at s + 1.

    Raises:
        DroppeftError: see :func:`head_loss`.
    """
    hidden = last_hidden_states(model, inputs)[:, -labels.shape[1] :]  # a prompt may stand before
    supervised = labels[:, 1:] != IGNORED
    return head_loss(model, hidden[:, :-1][supervised], labels[:, 1:][supervised])


def last_hidden_states(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Run a causal language model up to its head, and return the states (B, S, H) for the head.

    With the virtual tokens of prompt tuning S is larger than that of the inputs.
    """
    found: list[torch.Tensor] = []

    def take(base: nn.Module, arguments: object, output: Any) -> Any:
        found.append(output.last_hidden_state)
        output.last_hidden_state = found[0][:, :0]  # the head has nothing to do
        return output

    hook = _base(_causal(model)).register_forward_hook(take)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return found[0]


def head_loss(model: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> CompletionLoss:
    """Return the loss of hidden states, each with the token that follows it.

    Args:
        model: as in :func:`completion_loss`.
        hidden: (N, H), as the head takes them.
        targets: (N,), int64. N may be 0; the loss is then 0, with gradients of 0.

    Raises:
        DroppeftError: gradients are enabled, and the head is not frozen.
    """
    causal = _causal(model)
    _check_frozen(causal.get_output_embeddings())

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        def finished(*_: object, **__: object) -> Any:
            return _States(last_hidden_state=states.unsqueeze(0))

        with set_temporarily(_base(causal), "forward", finished):
            logits: torch.Tensor = causal(input_ids=targets.new_zeros(1, 1)).logits
        return logits.squeeze(0).float()

    rows = max(1, LOGITS_AT_ONCE // int(causal.config.get_text_config().vocab_size))
    loss, correct = _HeadLoss.apply(hidden, targets, logits_of, rows)  # type: ignore[no-untyped-call]
    return CompletionLoss(loss, len(targets), correct)


class _States(BaseModelOutputWithPast):  # type: ignore[misc]
    """Final hidden states, without what some models return beside them."""

    cross_attentions = router_logits = None


class _HeadLoss(torch.autograd.Function):
    """Sums the cross-entropy over parts of the rows, and the number of correct predictions.

    The gradient with respect to the states is computed part by part in the forward pass. What
    remains for the backward pass has the size of the states; the logits of a part are freed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needed = ctx.needs_input_grad[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        correct = targets.new_zeros(())
        gradients: list[torch.Tensor] = []
        parts = torch.split(hidden, rows), torch.split(targets, rows)
        for states, wanted in zip(*parts, strict=True):
            # Inside, hooks that a caller has set would keep the logits of all parts.
            with torch.set_grad_enabled(needed), _no_hooks():
                states = states.detach().requires_grad_(needed)
                logits = logits_of(states)
                loss = functional.cross_entropy(logits, wanted, reduction="sum")
                if needed:
                    gradients += torch.autograd.grad(loss, states)
            total += loss.detach()
            correct += (logits.detach().argmax(dim=-1) == wanted).sum()
        if needed:
            ctx.save_for_backward(torch.cat(gradients))
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor, *_: object
    ) -> tuple[torch.Tensor, None, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return (of_hidden * gradient).to(of_hidden.dtype), None, None, None


def _check_frozen(head: nn.Module) -> None:
    if torch.is_grad_enabled() and any(value.requires_grad for value in head.parameters()):
        raise DroppeftError(
            "the head of this language model is not frozen, but this loss gives it no gradient; "
            "attach an adapter first, or call requires_grad_(False) on the head"
        )


def _no_hooks() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda value: value, lambda value: value)


def _causal(model: Any) -> Any:
    """Return transformers' model with its head, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _base(causal: Any) -> nn.Module:
    """Return the transformer under the head."""
    base: nn.Module = causal.get_decoder()
    return base
