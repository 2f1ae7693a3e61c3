"""Training steps of large random models, timed and metered in pairs.

Used by `run.py`. Ours: the two steps of a pair are taken one right after the other,
in random order, since a shared machine changes its speed from minute to minute.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from droppeft import seeds
from droppeft.adapters.attach import attach
from droppeft.layer_dropout import find_blocks
from droppeft.messages.instruction import AdapterSpec, LayerAdapter
from droppeft.models.architectures import ARCHITECTURES
from droppeft.models.loading import load_backbone
from droppeft.models.precision import autocast
from droppeft.training.activation_memory import ActivationMeter

SEED = 0
METERED = 5
"""Rounds whose stored bytes are measured, in forwards of their own."""

_OPT = {
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "word_embed_proj_dim": 768,
    "dropout": 0.0,
}
ARCHITECTURES["opt-125m"] = _OPT
ARCHITECTURES["opt-125m-layerdrop"] = {**_OPT, "layerdrop": 0.5}
ARCHITECTURES["llama-7b"] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
}

Batch = Mapping[str, torch.Tensor]
Forward = Callable[[], Any]


@dataclass(frozen=True)
class Bench:
    """A model in training mode, with adapters in all layers, and one batch for it."""

    model: Any
    batch: Batch

    @property
    def device(self) -> torch.device:
        return self.batch["input_ids"].device

    @property
    def precision(self) -> str:
        return "bf16" if self.device.type == "cuda" else "fp32"

    @property
    def num_layers(self) -> int:
        return len(find_blocks(self.model)[1])


def build(shape: str, device: torch.device) -> Bench:
    """Make a model with random weights, LoRA's B included, from ``ARCHITECTURE:BATCHxTOKENS``."""
    name, _, size = shape.partition(":")
    rows, tokens = map(int, size.split("x"))
    backbone = load_backbone(f"config:{name}", ("no", "yes"), SEED)
    backbone.model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    spec = AdapterSpec((LayerAdapter("lora", rank=8),) * backbone.num_layers, alpha=16.0)
    model: Any = attach(backbone.model, spec, backbone.blocks_path, SEED, backbone.new_modules)
    model.get_base_model().config.use_cache = False  # the caches of a sliced model have no place
    rng = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.copy_(torch.randn(value.shape, generator=rng) * 0.02)
    batch = {
        "input_ids": torch.randint(1000, 30000, (rows, tokens), generator=rng).to(device),
        "labels": torch.randint(0, 2, (rows,), generator=rng).to(device),
    }
    return Bench(model.train(), batch)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def warm_optimizer(model: Any, bench: Bench) -> torch.optim.AdamW:
    """An AdamW that has taken a step at full depth, so that it has moments for all layers."""
    optimizer = torch.optim.AdamW(trainable(model), lr=0.0, weight_decay=0.01)
    model.eval()
    timed_step(lambda: model(**bench.batch), optimizer, bench)
    model.train()
    return optimizer


def part_of(optimizer: torch.optim.AdamW, model: nn.Module) -> torch.optim.AdamW:
    """An optimizer for the parameters of a sliced model, with the same moments."""
    part = torch.optim.AdamW(trainable(model), lr=0.0, weight_decay=0.01)
    part.state.update({value: optimizer.state[value] for value in trainable(model)})
    return part


@dataclass(frozen=True)
class Step:
    """What a step took.

    Attributes:
        wall_s, cpu_s: a clock's seconds, and the process's own; the second are steadier where
            others use the machine, and say little where a GPU works.
        device_bytes: on CUDA, the most that was allocated, including what was allocated before.
    """

    wall_s: float
    cpu_s: float
    loss: torch.Tensor
    device_bytes: int | None


def timed_step(forward: Forward, optimizer: torch.optim.Optimizer, bench: Bench) -> Step:
    """Forward, backward, AdamW's step."""
    on_cuda = bench.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    wall, cpu = time.perf_counter(), time.process_time()
    with autocast(bench.precision, bench.device):
        loss = forward().loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if on_cuda:
        torch.cuda.synchronize()
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    device_bytes = torch.cuda.max_memory_allocated() if on_cuda else None
    return Step(wall_s, cpu_s, loss.detach(), device_bytes)


def stored_bytes(model: nn.Module, forward: Forward, bench: Bench) -> int:
    """Bytes that a forward stores for its backward."""
    meter = ActivationMeter(model)
    with autocast(bench.precision, bench.device), meter.measuring():
        forward()
    return meter.peak_bytes


def interval(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Three columns: median of the pairs' ratios, and the ends of its bootstrap 95 % interval."""
    ratios = np.divide(above, below)
    rng = seeds.numpy_generator(SEED, purpose="bootstrap")
    medians = np.median(rng.choice(ratios, (5000, len(ratios))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return {name: float(np.median(ratios)), f"{name}_low": float(low), f"{name}_high": float(high)}


@dataclass(frozen=True)
class Side:
    """One of the two steps of a pair; ``prepare`` seeds the draws of its forward."""

    prepare: Callable[[], object]
    forward: Forward
    model: nn.Module
    optimizer: torch.optim.Optimizer


def measure_pair(
    sides: Mapping[str, Side], bench: Bench, round: int, rng: random.Random
) -> dict[str, Any]:
    """Take the two steps in random order; in the first rounds two forwards for the bytes follow."""
    pair: dict[str, Any] = {}
    losses = []
    for name in rng.sample(list(sides), len(sides)):
        side = sides[name]
        side.prepare()
        step = timed_step(side.forward, side.optimizer, bench)
        losses.append(step.loss)
        pair[f"{name}_wall_s"], pair[f"{name}_cpu_s"] = step.wall_s, step.cpu_s
        if step.device_bytes is not None:
            pair[f"{name}_device_bytes"] = step.device_bytes
    if round < METERED:
        for name, side in sides.items():
            side.prepare()
            pair[f"{name}_bytes"] = stored_bytes(side.model, side.forward, bench)
    return pair | {"same_loss": torch.equal(*losses)}


def columns(pairs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Pairs as one list per figure; bytes were measured in the first of them only."""
    return {key: [pair[key] for pair in pairs if key in pair] for key in pairs[0]}
