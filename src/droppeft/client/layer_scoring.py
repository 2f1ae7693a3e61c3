"""On the client, after its training: score the layers and choose which are shared; ours."""

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
from droppeft.messages import Instruction, Tensors
from droppeft.sharing.criteria import LocalResult, Seen, scores_of
from droppeft.sharing.selection import count_of, select_shared, unmoved
from droppeft.training.gradients import Vector
from droppeft.training.loop import Evaluation, TrainOutcome


@dataclass(frozen=True)
class LayerChoice:
    """What a client chose.

    Attributes:
        scores: (L,) by the rule's criterion.
        shared: layers, in order; of those that the turn did not move the ones that were.
        personal: the other layers that have an adapter.
        tokens, wall_s: of the forwards that scoring took, padding included.
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
    """Score the layers of the model as the turn left it, and choose by the instruction's rule, if
    any.

    Args:
        client_model: left as it is.
        parameters: what the turn trained.
        outcome: of the result.
        start_values: that ``parameters`` had before it, where the criterion reads them.
        measure: the model as it is, on so many rows of the client's validation part.
    """
    rule = instruction.sharing
    if rule is None:
        return None
    model = _Model(client_model, parameters, start_values, partial(measure, rule.score_rows))
    moved = tuple(
        key for key in parameters if isinstance(key, int) and outcome.active_steps[key] > 0
    )
    result = LocalResult(
        active_steps=np.array(outcome.active_steps, dtype=np.float64),
        gradients=outcome.gradients,
        change=model.change,
        seen=model.seen,
        undone=model.undone,
        moved=moved,
        rng=seeds.numpy_generator(
            instruction.seed,
            purpose="layer scores",
            round=instruction.round,
            client=instruction.client,
        ),
        typical=None if rule.typical is None else np.array(rule.typical),
    )
    count = count_of(rule.fraction, len(moved))
    has_choice = 0 < count < len(moved)
    scores = scores_of(rule.criterion, result) if has_choice else (0.0,) * client_model.num_layers
    chosen = select_shared(scores, moved, count, rule.shared, rule.hysteresis)
    layers = [key for key in client_model.parameters if isinstance(key, int)]
    shared = unmoved(layers, moved, rule.shared).union(chosen)
    kept = tuple(layer for layer in layers if layer not in shared)
    return LayerChoice(scores, tuple(sorted(shared)), kept, model.tokens, model.wall_s)


class _Model:
    """What criteria can find out about the model; what running it takes is added up."""

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

    def change(self) -> Vector:
        """(L,) norms of what the turn changed."""
        found, now = np.zeros(self._client_model.num_layers), get_tensors(self._parameters)
        for layer, named in now.items():
            if isinstance(layer, int):
                moved = [np.subtract(named[name], self._start[layer][name]) for name in named]
                found[layer] = np.sqrt(sum(float(np.square(one).sum()) for one in moved))
        return found

    def undone(self, layers: Sequence[int]) -> list[float]:
        """Loss with each layer as the turn found it, less that of the model as it is."""
        whole, now, found = self._measure().loss, get_tensors(self._parameters), []
        for layer in layers:
            set_tensors(self._parameters, {layer: self._start[layer]})
            found.append(self._measure().loss - whole)
            set_tensors(self._parameters, {layer: now[layer]})
        return found

    def seen(self) -> list[Seen]:
        """What each block makes of the rows."""
        with _watching(self._client_model.model, self._client_model.blocks) as watches:
            self._measure()
        return [watch.seen() for watch in watches]

    def _measure(self) -> Evaluation:
        measured = self._measure_once()
        self.tokens += measured.tokens
        self.wall_s += measured.wall_s
        return measured


class _Watch:
    """Sums over the rows that a block was run with."""

    def __init__(self) -> None:
        self.cosines, self.tokens = 0.0, 0.0
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []

    def note(self, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add a batch: states (B, S, H) and which tokens (B, S) are real."""
        real = torch.ones(before.shape[:2]) if mask is None else mask
        real = real.to(before.device, torch.float32)
        before, after = before.float(), after.float()
        cosine = nn.functional.cosine_similarity(before, after, dim=-1)
        self.cosines += float((cosine * real).sum())
        self.tokens += float(real.sum())
        for found, states in ((self.before, before), (self.after, after)):
            sums = (states * real.unsqueeze(-1)).sum(dim=1)
            found.append((sums / real.sum(dim=1, keepdim=True).clamp(min=1)).cpu())

    def seen(self) -> Seen:
        return Seen(
            cosine=self.cosines / max(self.tokens, 1.0),
            before=torch.cat(self.before).double().numpy(),
            after=torch.cat(self.after).double().numpy(),
        )


@contextmanager
def _watching(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[list[_Watch]]:
    """Note what goes into every block and what comes out, inside."""
    watches, masks = [_Watch() for _ in blocks], [None]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks[0] = kwargs.get("attention_mask")

    def leave(watch: _Watch) -> Callable[..., None]:
        def hook(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            after = output[0] if isinstance(output, tuple) else output
            watch.note(hidden_of((args, kwargs)), after, masks[0])

        return hook

    hooks = [model.register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [
        block.register_forward_hook(leave(watch), with_kwargs=True)
        for block, watch in zip(blocks, watches, strict=True)
    ]
    try:
        yield watches
    finally:
        for hook in hooks:
            hook.remove()
