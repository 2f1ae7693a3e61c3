"""Which settings fit into a device's memory and time, from configurations alone.

Ours. Nothing is loaded and nothing is trained: costs are counted (:mod:`droppeft.costs.fake_step`).
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from droppeft.config import (
    AdapterConfig,
    Config,
    DeviceProfile,
    as_tree,
    flat,
    load_config,
    read_toml,
    resolve_layers,
)
from droppeft.config.schema import HALF, RIVALS
from droppeft.costs.device_profiles import profile_named
from droppeft.costs.fake_step import FakeModel, count_step
from droppeft.costs.modelled_clock import compute_seconds
from droppeft.costs.step_counts import StepCounts
from droppeft.costs.step_memory import Memory, most_active, step_memory
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.methods import method_named
from droppeft.methods.droppeft import configured_rates
from droppeft.methods.rules import check_costly
from droppeft.resources.model_shape import check_runnable, outlined

GRID: dict[str, tuple[str, ...]] = {
    "model": (),
    "adapter.type": (),
    "training.batch_size": ("4", "16"),
    "training.max_length": (),
    "dropout.mean": ("0", "0.25", "0.5", "0.75"),
    "frozen.layers": ("0", HALF),
    "training.precision": ("fp32", "bf16"),
    "quantization": ("none", "8bit", "4bit"),
    "training.checkpointing": ("false", "true"),
    "training.offload": (),
}
"""Settings that may have several values, and those that are tried where nothing is said; where
there are none it is a run's default. ``half`` is half of a model's layers."""

RIVALS_OF_THE_MEAN = {f"dropout.{key}" for key in RIVALS["dropout"]} - {"dropout.mean"}

WORST_OF_STEPS = 1000
"""With ``dropout.sampling=bernoulli`` the memory is that of the worst of so many steps."""

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Limits:
    """What a device has.

    Attributes:
        memory_bytes: for the whole training process.
        step_s: seconds that a step may take, or ``None``.
        profile: of the device that takes them, or ``None``.
    """

    memory_bytes: float
    step_s: float | None
    profile: DeviceProfile | None


@dataclass(frozen=True)
class Option:
    """A combination of settings, and what it costs.

    Attributes:
        config: of a run.
        num_layers: L of its model.
        active: most layers that run in a step.
        memory: at the worst moment, by part.
        step_s: modelled seconds of a mean step, ``None`` without a profile.
    """

    config: Config
    num_layers: int
    active: int
    memory: Memory
    step_s: float | None

    @property
    def task(self) -> tuple[object, ...]:
        """What no saving changes: model, adapter, batch, length."""
        training = self.config.training
        kind = self.config.adapter.type
        return self.config.model, kind, training.batch_size, training.max_length

    @property
    def savings(self) -> tuple[float, ...]:
        """How far each way to save is gone, 0 for not at all."""
        config, training = self.config, self.config.training
        return (
            config.dropout.mean or 0.0,
            config.frozen.count,
            ("fp32", "bf16", "fp16").index(training.precision),
            ("none", "8bit", "4bit").index(config.quantization),
            training.checkpointing,
            training.offload,
        )

    @property
    def words(self) -> list[str]:
        """What ``droppeft run`` has to be told for it."""
        typical, own = flat(as_tree(Config())), flat(as_tree(self.config))
        unusual = [
            key for key, value in own.items() if key not in GRID and value != typical.get(key)
        ]
        return [f"{key}={_text(own[key])}" for key in (*GRID, *unusual) if key in own]

    def excess(self, limits: Limits) -> float:
        """What it takes of the tighter limit, as a part: above 1 it does not fit."""
        parts = [self.memory.total / limits.memory_bytes]
        if limits.step_s is not None and self.step_s is not None:
            parts.append(self.step_s / limits.step_s)
        return max(parts)


def limits(
    memory: str | None, step_s: float | None, profile: str | None, own: Mapping[str, DeviceProfile]
) -> Limits:
    """Limits as they are said on a command line.

    Args:
        memory: a size; ``None`` for that of the device.
        step_s: longest step, ``None`` for any.
        profile: name of one, ``None`` for none.
        own: profiles besides the known ones.

    Raises:
        DroppeftError: neither memory nor profile, a time without a profile, or one that is unknown.
    """
    known = profile_named(profile, own) if profile is not None else None
    if step_s is not None and profile is None:
        raise DroppeftError("--seconds needs --profile, whose time it is")
    if memory is not None:
        return Limits(parse_bytes(memory), step_s, known)
    if known is None:
        raise DroppeftError("say what a device has: --memory 8GB, or --profile jetson_tx2")
    return Limits(known.memory_bytes, step_s, known)


def combinations(path: Path | None, words: Sequence[str]) -> Iterator[Config]:
    """All combinations of the given values, and of those tried where nothing is given.

    Args:
        path: configuration file of a run, or ``None``; what it sets has one value.
        words: ``key=value``; a setting of :data:`GRID` may have several values, ``a,b``.

    Raises:
        DroppeftError: a value that no run takes, a setting that changes nothing in what a step
            costs, or an unknown model.
    """
    check_costly(words)
    choices, fixed = _choices(path, words)
    for chosen in itertools.product(*choices.values()):
        named = dict(zip(choices, chosen, strict=True))
        config = load_config(path, [*fixed, *(f"{key}={value}" for key, value in named.items())])
        yield resolve_layers(config, outlined(config.model).num_layers)


def _choices(
    path: Path | None, words: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Values of each setting that varies, and the other words."""
    given = {key for table in (read_toml(path) if path else {}).items() for key in _keys(*table)}
    choices = {key: values for key, values in GRID.items() if values and key not in given}
    fixed: list[str] = []
    for word in words:
        key, equals, values = (part.strip() for part in word.partition("="))
        if equals and key in GRID:
            choices[key] = tuple(value.strip() for value in values.split(","))
        else:
            fixed.append(word)
    if {word.partition("=")[0].strip() for word in fixed} & RIVALS_OF_THE_MEAN:
        choices.pop("dropout.mean", None)
    return {key: choices[key] for key in GRID if key in choices}, fixed


def _keys(name: str, value: Any) -> list[str]:
    """Of a table of the file, or of one setting; a count or rates stand for the mean."""
    if not isinstance(value, Mapping):
        return [name]
    keys = [f"{name}.{key}" for key in value]
    return [*keys, "dropout.mean"] if RIVALS_OF_THE_MEAN & {*keys} else keys


def option(config: Config, profile: DeviceProfile | None) -> Option:
    """What a combination costs.

    Args:
        config: of a run.
        profile: of the device whose time it is, or ``None``.

    Raises:
        DroppeftError: a run would refuse it, or it cannot be counted.
    """
    check_runnable(config)
    layers, frozen = outlined(config.model).num_layers, config.frozen.count
    rates = _rates(config, layers)[frozen:]
    if config.dropout.schedule != "constant":
        rates = (0.0,) * len(rates)  # some rounds run at full depth
    active = most_active(rates, config.dropout.sampling, WORST_OF_STEPS)
    held = active if config.dropout.every == "round" else layers - frozen
    return Option(
        config=config,
        num_layers=layers,
        active=active,
        memory=step_memory(
            counts_of(config),
            active,
            frozen,
            held=held if config.training.offload else None,
            cached=config.frozen.cache,
        ),
        step_s=compute_seconds(profile, mean_flops(config), 1) if profile else None,
    )


def mean_flops(config: Config) -> float:
    """FLOPs of a mean step at the configured rates; of frozen layers with kept states on the disk.

    Without kept states they run forward in every step.
    """
    counts, frozen = counts_of(config), config.frozen.count
    rates = _rates(config, len(counts.blocks))
    behind = list(zip(counts.blocks, rates, strict=True))[frozen:]
    first = () if config.frozen.cache else counts.blocks[:frozen]
    forward = sum(block.forward_flops for block in first)
    return counts.rest.flops + forward + sum(block.flops * (1 - rate) for block, rate in behind)


def _rates(config: Config, layers: int) -> tuple[float, ...]:
    """Of every layer, in a method that drops layers."""
    if "dropout" not in method_named(config.method).tables:
        return (0.0,) * layers
    return configured_rates(config.dropout, layers, config.frozen.count)


def counts_of(config: Config) -> StepCounts:
    """Counts of a step at full depth with an adapter in every layer; each is made once.

    Raises:
        DroppeftError: the model cannot be counted.
    """
    training = config.training
    return _counts(
        config.model,
        config.adapter.model_dump_json(),
        config.quantization,
        counted_on(config),
        training.batch_size,
        training.max_length,
        training.precision,
        training.checkpointing,
    )


def counted_on(config: Config) -> str:
    """Whose kernels are counted; those of CUDA, which store other things, only where it is."""
    return "cuda" if config.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def least_savings(options: Sequence[Option]) -> list[Option]:
    """Those that save no more than they must: none does the same with less saved in every way.

    Ordered by model and adapter as given, then by batch and length, large first, then by how many
    ways to save are used, and how far.
    """
    best = [one for one in options if not any(_saves_less(other, one) for other in options)]
    models = {one.task[:2]: number for number, one in reversed(list(enumerate(options)))}
    return sorted(best, key=lambda one: (models[one.task[:2]], *_large_first(one), *_effort(one)))


def _saves_less(one: Option, than: Option) -> bool:
    return (
        one.task == than.task
        and one.savings != than.savings
        and all(a <= b for a, b in zip(one.savings, than.savings, strict=True))
    )


def _large_first(one: Option) -> tuple[int, int]:
    training = one.config.training
    return -training.batch_size, -training.max_length


def _effort(one: Option) -> tuple[float, ...]:
    return sum(saving > 0 for saving in one.savings), *one.savings


def parse_bytes(text: str) -> int:
    """Read a size as ``8GB``, ``7.5 GiB`` or a number of bytes.

    Raises:
        DroppeftError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS or float(found[1]) == 0:
        raise DroppeftError(f"{text!r} is no size of memory; write it as 8GB, 7.5GiB or 512MB")
    return int(float(found[1]) * UNITS[found[2].lower()])


@lru_cache(maxsize=8)
def _paper(model: str, adapter: str, quantization: str, device: str) -> FakeModel:
    outline = outlined(model)
    spec = adapter_spec(AdapterConfig.model_validate_json(adapter), outline.num_layers)
    return FakeModel(outline.config, spec, outline.new_modules, quantization, device)


@cache
def _counts(
    model: str,
    adapter: str,
    quantization: str,
    device: str,
    batch: int,
    length: int,
    precision: str,
    checkpointing: bool,
) -> StepCounts:
    paper = _paper(model, adapter, quantization, device)
    return count_step(paper, batch, length, precision, checkpointing)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
