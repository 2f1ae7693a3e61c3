"""Scores a client's layers after local training, and chooses which are shared. Ours."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from droppeft import seeds
from droppeft.adapters.by_layer import Parameters, get_tensors, set_tensors
from droppeft.client.client_model import ClientModel
from droppeft.layer_dropout.architectures import hidden_of
from droppeft.messages.instruction import Instruction
from droppeft.messages.tensors import Tensors
from droppeft.sharing.criteria import SCORE_ROWS, BlockStates, LocalResult, scores_of
from droppeft.sharing.selection import count_of, select_shared, unchanged_shared
from droppeft.training.loop import Evaluation, TrainOutcome


@dataclass(frozen=True)
class LayerChoice:
    """Which layers a client shares, and what scoring them took.

    Attributes:
        scores: (L,) scores by the rule's criterion.
        shared: the shared layers, in order: those that were chosen, and those that did not change
            and were shared before.
        personal: the other layers that have an adapter.
        tokens, wall_s: tokens, padding included, and seconds of the forward passes for scoring.
    """

    scores: tuple[float, ...]
    shared: tuple[int, ...]
    personal: tuple[int, ...]
    tokens: int
    wall_s: float


def score_layers(
    client_model: ClientModel,
    parameters: Parameters,
    instruction: Instruction,
    outcome: TrainOutcome,
    start_values: Tensors,
    measure: Callable[[int], Evaluation],
) -> LayerChoice | None:
    """Score the layers after local training, and choose the shared ones by the instruction's rule.

    Args:
        client_model: the model after local training; it is not changed.
        parameters: the parameters that were trained.
        instruction: the instruction of the local training.
        outcome: the outcome of the local training.
        start_values: values of ``parameters`` before local training, if the criterion needs them.
        measure: evaluates the model on this many of the client's validation rows.

    Returns:
        ``None`` if the instruction has no sharing rule.
    """
    rule = instruction.sharing
    if rule is None:
        return None
    model = _Model(client_model, parameters, start_values, partial(measure, SCORE_ROWS))
    changed = tuple(
        key for key in parameters if isinstance(key, int) and outcome.active_steps[key] > 0
    )
    result = LocalResult(
        active_steps=np.array(outcome.active_steps, dtype=np.float64),
        gradients=outcome.gradients,
        block_states=model.block_states,
        loss_increases=model.loss_increases,
        changed_layers=changed,
        rng=seeds.numpy_generator(
            instruction.seed,
            purpose="layer scores",
            round=instruction.round,
            client=instruction.client,
        ),
        typical=None if rule.typical is None else np.array(rule.typical),
    )
    count = count_of(rule.fraction, len(changed))
    has_choice = 0 < count < len(changed)
    scores = scores_of(rule.criterion, result) if has_choice else (0.0,) * client_model.num_layers
    chosen = select_shared(scores, changed, count, rule.shared, rule.hysteresis)
    layers = [key for key in client_model.parameters if isinstance(key, int)]
    shared = unchanged_shared(layers, changed, rule.shared).union(chosen)
    personal = tuple(layer for layer in layers if layer not in shared)
    return LayerChoice(scores, tuple(sorted(shared)), personal, model.tokens, model.wall_s)


class _Model:
    """Computes what criteria need of the model, and adds up what its forward passes take."""

    def __init__(
        self,
        client_model: ClientModel,
        parameters: Parameters,
        start_values: Tensors,
        measure: Callable[[], Evaluation],
    ) -> None:
        self._client_model = client_model
        self._parameters = parameters
        self._start = start_values
        self._measure_once = measure
        self.tokens = 0
        self.wall_s = 0.0

    def loss_increases(self, layers: Sequence[int]) -> list[float]:
        """Return by how much the loss rises when one layer alone gets its start values back."""
        trained_loss, now, increases = self._measure().loss, get_tensors(self._parameters), []
        for layer in layers:
            set_tensors(self._parameters, {layer: self._start[layer]})
            increases.append(self._measure().loss - trained_loss)
            set_tensors(self._parameters, {layer: now[layer]})
        return increases

    def block_states(self) -> list[BlockStates]:
        """Return the hidden states before and after each block, on the validation rows."""
        with _recording(self._client_model.model, self._client_model.blocks) as recorders:
            self._measure()
        return [recorder.states() for recorder in recorders]

    def _measure(self) -> Evaluation:
        measured = self._measure_once()
        self.tokens += measured.tokens
        self.wall_s += measured.wall_s
        return measured


class _BlockRecorder:
    """Sums up the hidden states before and after one block over the rows of several batches."""

    def __init__(self) -> None:
        self.cosines, self.tokens = 0.0, 0.0
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []

    def add(self, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add a batch: hidden states (B, S, H), and a mask (B, S) of tokens that are no padding."""
        real = torch.ones(before.shape[:2]) if mask is None else mask
        real = real.to(before.device, torch.float32)
        before, after = before.float(), after.float()
        cosine = nn.functional.cosine_similarity(before, after, dim=-1)
        self.cosines += float((cosine * real).sum())
        self.tokens += float(real.sum())
        for means, states in ((self.before, before), (self.after, after)):
            sums = (states * real.unsqueeze(-1)).sum(dim=1)
            means.append((sums / real.sum(dim=1, keepdim=True).clamp(min=1)).cpu())

    def states(self) -> BlockStates:
        return BlockStates(
            cosine=self.cosines / max(self.tokens, 1.0),
            before=torch.cat(self.before).double().numpy(),
            after=torch.cat(self.after).double().numpy(),
        )


@contextmanager
def _recording(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[list[_BlockRecorder]]:
    """Record the hidden states before and after every block, inside the context."""
    recorders, masks = [_BlockRecorder() for _ in blocks], [None]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks[0] = kwargs.get("attention_mask")

    def leave(recorder: _BlockRecorder) -> Callable[..., None]:
        def hook(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            after = output[0] if isinstance(output, tuple) else output
            recorder.add(hidden_of((args, kwargs)), after, masks[0])

        return hook

    hooks = [model.register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [
        block.register_forward_hook(leave(recorder), with_kwargs=True)
        for block, recorder in zip(blocks, recorders, strict=True)
    ]
    try:
        yield recorders
    finally:
        for hook in hooks:
            hook.remove()
