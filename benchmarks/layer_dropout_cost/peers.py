"""Other ways to drop layers of an OPT model, and what each does with a layer that it drops.

Used by `run.py`. Sources: `layerdrop` of transformers' OPT (LayerDrop,
arXiv:1909.11556) and `prepare_layer_dropout` of torchtune, both through their own interface; the
hand-written loop and the multiplication (stochastic depth, arXiv:1603.09382) are ours.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.layer_dropout_cost.steps import Batch, trainable
from droppeft.layer_dropout import (
    find_blocks,
    gated,
    layer_dropout,
    layer_rates,
    protected_ends,
)
from droppeft.layer_dropout.dropout import modes_of_step
from droppeft.layer_dropout.modes import Mode
from droppeft.layer_dropout.options import GateOptions

RATE = 0.5
Active = tuple[bool, ...]


@dataclass(frozen=True)
class Way:
    """One way to drop layers.

    Attributes:
        model: has what is trained.
        forward: (batch, gates) to what the model returns; a way that draws for itself ignores the
            gates. Named arguments go to the model.
        draw: seed to the gates of the next forward; a way that draws for itself is seeded by
            it. ``None``: there are no gates that hold for the whole batch.
        ran: the share of the rows that the last forward ran through each layer, if it is not what
            the gates say.
        by_model: the forward is the model's own, so that its other outputs can be asked for.
    """

    model: Any
    forward: Callable[..., Any]
    draw: Callable[[int], Active | None]
    ran: Callable[[], Sequence[float]] | None = None
    by_model: bool = True


def shell(model: nn.Module) -> Any:
    """Copy the modules but no tensors: other modules may be put into it, no memory is doubled."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class Slicer:
    """A model with fewer layers, of the same weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = shell(model)
        self._path, self._blocks = find_blocks(self.model)

    def with_layers(self, active: Active) -> Any:
        """Leave only the active blocks in the list; the configuration says so, too."""
        chosen = [block for block, runs in zip(self._blocks, active, strict=True) if runs]
        self.model.set_submodule(self._path, nn.ModuleList(chosen))
        self.model.get_base_model().config.num_hidden_layers = len(chosen)
        return self.model


def active_in_step(step: int, rates: Sequence[float], options: GateOptions) -> Active:
    """Which layers run in a step."""
    return tuple(mode is Mode.TRAIN for mode in modes_of_step(step, rates, options))


def default_gates(num_layers: int, mean: float, seed: int) -> Active:
    """Exact gates, first and last layer never dropped: droppeft's defaults."""
    rates = layer_rates(mean, "uniform", num_layers, protected=protected_ends(num_layers, 1, 1))
    return active_in_step(seed, rates, {"seed": 0})


def check_executed(executed: Sequence[int], active: Active) -> None:
    """Raise if other blocks ran than the gates say."""
    if tuple(executed) != tuple(map(int, active)):
        raise SystemExit(f"the gates were {active}, but the blocks ran {executed} times")


@contextmanager
def gated_way(model: nn.Module) -> Iterator[Way]:
    """Ours, as in `droppeft run`."""
    _, blocks = find_blocks(model)
    with gated(blocks) as gates:

        def forward(batch: Batch, active: Active, **options: Any) -> Any:
            gates.active = active
            gates.reset_executed()
            output = model(**batch, **options)
            check_executed(gates.executed, active)
            return output

        yield Way(model, forward, lambda seed: default_gates(len(blocks), RATE, seed))


@contextmanager
def alone_way(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Way]:
    """Ours, for a loop of one's own."""
    with layer_dropout(model, optimizer, RATE) as dropout:

        def draw(seed: int) -> Active:
            dropout.step = seed
            return dropout.active

        yield Way(model, by_model(model), draw)


def plain_way(model: nn.Module) -> Way:
    """No dropout at all."""
    _, blocks = find_blocks(model)
    return Way(model, by_model(model), lambda seed: None, ran=lambda: [1.0] * len(blocks))


def looped_way(model: Any) -> Way:
    """The cheapest possible: an `if` in a loop over the blocks, written for this model alone."""
    opt = model.get_base_model()
    decoder = opt.model.decoder

    def forward(batch: Batch, active: Active) -> Any:
        ids = batch["input_ids"]
        hidden = decoder.embed_tokens(ids) + decoder.embed_positions(torch.ones_like(ids))
        for block, runs in zip(decoder.layers, active, strict=True):
            if runs or not model.training:
                hidden = block(hidden, attention_mask=None)
        logits = opt.score(decoder.final_layer_norm(hidden))[:, -1]
        loss = functional.cross_entropy(logits, batch["labels"])
        return SimpleNamespace(logits=logits, loss=loss)

    return Way(
        model,
        forward,
        lambda seed: default_gates(len(decoder.layers), RATE, seed),
        by_model=False,
    )


class _Multiplied(nn.Module):
    """A block whose output is multiplied by 0 or 1, and its input by the rest."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.gate = 1.0

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.training:
            return self.block(hidden, *args, **kwargs)
        return self.gate * self.block(hidden, *args, **kwargs) + (1 - self.gate) * hidden


def multiplied_way(model: nn.Module) -> Way:
    """Stochastic depth as vision models have it: everything runs, then counts or does not."""
    path, blocks = find_blocks(model)
    layers = [_Multiplied(block) for block in blocks]
    model.set_submodule(path, nn.ModuleList(layers))

    def forward(batch: Batch, active: Active, **options: Any) -> Any:
        for layer, runs in zip(layers, active, strict=True):
            layer.gate = float(runs)
        return model(**batch, **options)

    return Way(
        model,
        forward,
        lambda seed: default_gates(len(layers), RATE, seed),
        ran=lambda: [1.0] * len(layers),
    )


def layerdrop_way(model: nn.Module) -> Way:
    """transformers' own, for a model whose configuration has ``layerdrop=RATE``.

    It draws from torch's global generator. If nothing else draws from it (this model has no other
    dropout), the draws are known in advance.
    """
    _, blocks = find_blocks(model)

    def draw(seed: int) -> Active:
        torch.manual_seed(seed)
        active = tuple(bool(torch.rand([]) >= RATE) for _ in blocks)
        torch.manual_seed(seed)
        return active

    return Way(model, by_model(model), draw)


def torchtune_way(model: nn.Module) -> Way:
    """torchtune's wrappers around the blocks, which draw for every row of a batch.

    Raises:
        ImportError: torchtune, or a torchao that it can import, is not installed.
    """
    from torchtune.modules.layer_dropout import prepare_layer_dropout

    path, blocks = find_blocks(model)
    layers: Any = model.get_submodule(path)
    prepare_layer_dropout(layers, prob_max=RATE)

    def draw(seed: int) -> None:
        for index, layer in enumerate(layers):
            layer.dropout.generator.manual_seed(seed * len(blocks) + index)

    def ran() -> list[float]:
        return [float(layer.dropout.inferred) for layer in layers]

    return Way(model, by_model(model), draw, ran)


def by_model(model: nn.Module) -> Callable[..., Any]:
    return lambda batch, active, **options: model(**batch, **options)


def behaviour(way: Way, plain: Any, slicer: Slicer, batch: Batch) -> dict[str, Any]:
    """What a way does, measured on one row, whose gates are then those of the whole batch."""
    row = {name: value[:1] for name, value in batch.items()}
    seed, active = next(found for found in _draws(way, row) if not all(found[1]))
    dropped = active.index(False)
    logits = _forward(way, row, seed, active).logits
    reference = slicer.with_layers(active)(**row).logits
    return {
        "equals_sliced": torch.equal(logits, reference),
        "dropped_gradient": _dropped_gradient(way, row, seed, active, dropped),
        "dropped_moves": _dropped_moves(way, row, seed, active, dropped),
        "evaluates_in_full": _evaluates_in_full(way, plain, row, seed, active),
        "checkpoints": _checkpoints(way, row, seed, active),
        "names_kept": _names(way.model) == _names(plain),
        "hidden_states": _hidden_states(way, row, seed, active),
    }


def _draws(way: Way, row: Batch) -> Iterator[tuple[int, Active]]:
    for seed in range(100):
        active = way.draw(seed)
        if active is None and way.ran is not None:
            way.forward(row, active)
            active = tuple(share > 0 for share in way.ran())
        if active is not None:
            yield seed, active


def _forward(way: Way, row: Batch, seed: int, active: Active, **options: Any) -> Any:
    way.draw(seed)
    return way.forward(row, active, **options)


def _layer_parameters(way: Way, layer: int) -> list[nn.Parameter]:
    """A layer's adapters, by their place in the order of all: wrappers rename them."""
    adapters = [
        value
        for name, value in way.model.named_parameters()
        if value.requires_grad and ".layers." in name
    ]
    per_layer = len(adapters) // way.model.get_base_model().config.num_hidden_layers
    return adapters[layer * per_layer : (layer + 1) * per_layer]


def _dropped_gradient(way: Way, row: Batch, seed: int, active: Active, layer: int) -> str:
    way.model.zero_grad(set_to_none=True)
    _forward(way, row, seed, active).loss.backward()
    gradients = [value.grad for value in _layer_parameters(way, layer)]
    if all(gradient is None for gradient in gradients):
        return "none"
    return "values" if any(g is not None and bool(g.any()) for g in gradients) else "zeros"


def _dropped_moves(way: Way, row: Batch, seed: int, active: Active, layer: int) -> bool:
    """Take a step of AdamW in which the layer is dropped, after one in which it is not."""
    trained = trainable(way.model)
    kept = [value.detach().clone() for value in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    way.model.eval()
    _forward(way, row, seed, (True,) * len(active)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [value.detach().clone() for value in _layer_parameters(way, layer)]
    way.model.train()
    _forward(way, row, seed, active).loss.backward()
    optimizer.step()
    after = _layer_parameters(way, layer)
    moved = not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    with torch.no_grad():
        for value, old in zip(trained, kept, strict=True):
            value.copy_(old)
    return moved


def _evaluates_in_full(way: Way, plain: Any, row: Batch, seed: int, active: Active) -> bool:
    way.model.eval()
    plain.eval()
    with torch.no_grad():
        equal = torch.equal(_forward(way, row, seed, active).logits, plain(**row).logits)
    way.model.train()
    plain.train()
    return equal


def _checkpoints(way: Way, row: Batch, seed: int, active: Active) -> bool:
    """Whether gradients are the same bits with gradient checkpointing."""
    model, found = way.model.get_base_model(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        way.model.zero_grad(set_to_none=True)
        _forward(way, row, seed, active).loss.backward()
        found.append([value.grad for value in trainable(way.model)])
    model.activation_checkpointing_disable()
    way.model.zero_grad(set_to_none=True)
    return all(
        one is other if one is None or other is None else torch.equal(one, other)
        for one, other in zip(*found, strict=True)
    )


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _hidden_states(way: Way, row: Batch, seed: int, active: Active) -> int | None:
    """How many hidden states the model returns when asked for all; L + 1 at full depth."""
    if not way.by_model:
        return None
    return len(_forward(way, row, seed, active, output_hidden_states=True).hidden_states)
