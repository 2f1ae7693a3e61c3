"""Estimate which settings fit into a device's memory and time, from configurations only.

Ours. No weights are loaded and nothing is trained: costs are counted
(:mod:`droppeft.costs.fake_step`).
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from droppeft.config.exclusive import EXCLUSIVE
from droppeft.config.frozen import HALF
from droppeft.config.task_detection import detected_task
from droppeft.costs.fake_step import FakeModel, count_step
from droppeft.costs.modelled_clock import compute_seconds
from droppeft.costs.step_counts import StepCounts
from droppeft.costs.step_memory import Memory, most_active, step_memory
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.layer_dropout.modes import LayerModes, starts_of
from droppeft.methods import method_named
from droppeft.methods.droppeft import configured_rates
from droppeft.methods.step_settings import STEP_METHOD, check_step_settings, step_of
from droppeft.methods.without_effect import given
from droppeft.models.sources import find_source
from droppeft.resources.device_limits import Limits
from droppeft.resources.model_shape import check_runnable, model_shape

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
"""Settings that may have several values, with the values that are tried by default. A setting
without values here has a run's default. ``half`` is half of a model's layers."""

RIVALS_OF_THE_MEAN = {f"dropout.{key}" for key in EXCLUSIVE["dropout"]} - {"dropout.mean"}
"""Settings that exclude ``dropout.mean``."""

WORST_OF_STEPS = 1000
"""With ``dropout.sampling=bernoulli`` memory is that of the worst of this number of steps."""


@dataclass(frozen=True)
class Option:
    """A combination of settings and its costs.

    Attributes:
        config: of a run.
        num_layers: L of its model.
        active: largest number of layers that a step trains.
        memory: peak memory by what it is used for.
        step_s: modelled seconds of a mean step; ``None`` without a device profile.
    """

    config: Config
    num_layers: int
    active: int
    memory: Memory
    step_s: float | None

    @property
    def task(self) -> tuple[object, ...]:
        """What is the same with all savings: model, adapter type, batch size, length."""
        training = self.config.training
        kind = self.config.adapter.type
        return self.config.model, kind, training.batch_size, training.max_length

    @property
    def savings(self) -> tuple[float, ...]:
        """How far each way of saving is used; 0 means not at all."""
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
    def overrides(self) -> list[str]:
        """The overrides with which ``droppeft run`` has this configuration."""
        values = flat(as_tree(self.config))
        changed = [key for key in given(self.config) if key not in GRID]
        named = [f"{key}={_text(values[key])}" for key in (*GRID, *changed) if key in values]
        task, found = self.config.task, {"model": self.config.model, "data": self.config.data}
        first = [f"method={self.config.method}"]
        if task != detected_task(found):
            first.append(f"task={task}")
        return [*first, *named]

    def excess(self, limits: Limits) -> float:
        """Cost divided by the limit, for the tighter limit; above 1 the option does not fit."""
        parts = [self.memory.total / limits.memory_bytes]
        if limits.step_s is not None and self.step_s is not None:
            parts.append(self.step_s / limits.step_s)
        return max(parts)


def combinations(
    path: Path | None, overrides: Sequence[str], say: Callable[[str], None] = lambda step: None
) -> Iterator[Config]:
    """All combinations of the given values, and of :data:`GRID`'s for settings that are not given.

    Combinations that differ in nothing that the step uses are given once.

    Args:
        path: configuration file of a run, or ``None``; settings in it have one value.
        overrides: ``key=value``; a setting of :data:`GRID` may have several values, ``a,b``.
        say: called with what takes long, to show progress.

    Raises:
        DroppeftError: an invalid value, a setting that does not affect the costs of a step, or an
            unknown model.
    """
    check_step_settings(overrides)
    choices, fixed = _choices(path, overrides)
    known: set[str] = set()
    for chosen in itertools.product(*choices.values()):
        named = dict(zip(choices, chosen, strict=True))
        varied = [f"{key}={value}" for key, value in named.items()]
        config = step_of(load_config(path, [*fixed, *varied], STEP_METHOD))
        if config.training.precision == "auto":
            raise DroppeftError(
                "training.precision=auto depends on the machine of the run; give fp32 or bf16, or "
                "leave it out to see both"
            )
        find_source(config.model).convert(say)
        config = resolve_layers(config, model_shape(config.model, config.task).num_layers)
        if config.model_dump_json() not in known:
            known.add(config.model_dump_json())
            yield config


def _choices(
    path: Path | None, overrides: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Values of each setting that varies, and the other overrides."""
    given = {key for table in (read_toml(path) if path else {}).items() for key in _keys(*table)}
    choices = {key: values for key, values in GRID.items() if values and key not in given}
    fixed: list[str] = []
    for override in overrides:
        key, equals, values = (part.strip() for part in override.partition("="))
        if equals and key in GRID:
            choices[key] = tuple(value.strip() for value in values.split(","))
        else:
            fixed.append(override)
    if {override.partition("=")[0].strip() for override in fixed} & RIVALS_OF_THE_MEAN:
        choices.pop("dropout.mean", None)
    return {key: choices[key] for key in GRID if key in choices}, fixed


def _keys(name: str, value: Any) -> list[str]:
    """Keys of a table or setting of the file. A count or rates also count as ``dropout.mean``."""
    if not isinstance(value, Mapping):
        return [name]
    keys = [f"{name}.{key}" for key in value]
    return [*keys, "dropout.mean"] if RIVALS_OF_THE_MEAN & {*keys} else keys


def option(config: Config, profile: DeviceProfile | None) -> Option:
    """Estimate what a combination costs.

    Args:
        config: of a run.
        profile: the device profile for the time of a step, or ``None``.

    Raises:
        DroppeftError: a run would refuse the configuration, or it cannot be counted.
    """
    check_runnable(config)
    layers, frozen = model_shape(config.model, config.task).num_layers, config.frozen.count
    start = min(starts_of(config.backward.depths, layers, frozen))
    rates = _rates(config, layers)[frozen:]
    if config.dropout.schedule != "constant":
        rates = (0.0,) * len(rates)  # some rounds run at full depth
    running = most_active(rates, config.dropout.sampling, WORST_OF_STEPS)
    active = min(running, layers - start)
    loaded = running if config.dropout.every == "round" else layers - frozen
    return Option(
        config=config,
        num_layers=layers,
        active=active,
        memory=step_memory(
            counts_of(config),
            active,
            frozen,
            loaded=loaded if config.training.offload else None,
            cached=config.frozen.cache,
            start=start,
        ),
        step_s=compute_seconds(profile, mean_flops(config), 1) if profile else None,
    )


def mean_flops(config: Config) -> float:
    """FLOPs of a mean step: of each layer, by its modes.

    Cached layers do not run; frozen layers without a cache run forward in every step.
    """
    counts = counts_of(config)
    layers = len(counts.blocks)
    modes = LayerModes(
        layers=layers,
        frozen=config.frozen.count,
        cached=config.frozen.cache,
        starts=starts_of(config.backward.depths, layers, config.frozen.count),
        rates=_rates(config, layers),
    )
    flops = counts.rest.flops + modes.expected(
        [block.flops for block in counts.blocks], [block.forward_flops for block in counts.blocks]
    )
    return flops * config.training.batch_size / config.training.rows_at_once


def _rates(config: Config, layers: int) -> tuple[float, ...]:
    """Drop rate of every layer; 0 if the method does not drop layers."""
    if "dropout" not in method_named(config.method).tables:
        return (0.0,) * layers
    return configured_rates(config.dropout, layers, config.frozen.count)


def counts_of(config: Config) -> StepCounts:
    """Counts of a step at full depth with an adapter in every layer; they are cached.

    Raises:
        DroppeftError: the model cannot be counted.
    """
    training = config.training
    adapter = config.adapter.model_dump_json()
    return _counts(
        (
            config.model,
            config.task,
            adapter,
            config.quantization,
            counted_on(config),
            training.precision,
            training.backbone_dropout,
        ),
        training.rows_at_once,
        training.max_length,
        training.checkpointing,
    )


def counted_on(config: Config) -> str:
    """The device whose kernels are counted; CUDA's differ, and are used where available."""
    return "cuda" if config.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def least_savings(options: Sequence[Option]) -> list[Option]:
    """The options for which no other of the same task saves less in one way and no more in others.

    They are sorted by model and adapter as given, then by batch size and length, large first, then
    by how many ways of saving are used, and how far.
    """
    best = [each for each in options if not any(_saves_less(other, each) for other in options)]
    models = {each.task[:2]: number for number, each in reversed(list(enumerate(options)))}
    return sorted(
        best, key=lambda each: (models[each.task[:2]], *_large_first(each), *_effort(each))
    )


def _saves_less(option: Option, than: Option) -> bool:
    return (
        option.task == than.task
        and option.savings != than.savings
        and all(a <= b for a, b in zip(option.savings, than.savings, strict=True))
    )


def _large_first(option: Option) -> tuple[int, int]:
    training = option.config.training
    return -training.batch_size, -training.max_length


def _effort(option: Option) -> tuple[float, ...]:
    return sum(saving > 0 for saving in option.savings), *option.savings


FakeModelKey = tuple[str, str, str, str, str, str, bool]
"""Model, task, adapter as JSON, quantization, device, precision and backbone dropout."""


@lru_cache(maxsize=8)
def _fake_model(
    model: str,
    task: str,
    adapter: str,
    quantization: str,
    device: str,
    precision: str,
    dropout: bool,
) -> FakeModel:
    shape = model_shape(model, task)
    spec = adapter_spec(AdapterConfig.model_validate_json(adapter), shape.num_layers)
    return FakeModel(
        shape.config,
        task,
        spec,
        shape.new_modules,
        quantization,
        device,
        precision,
        backbone_dropout=dropout,
    )


@cache
def _counts(of: FakeModelKey, batch: int, length: int, checkpointing: bool) -> StepCounts:
    return count_step(_fake_model(*of), batch, length, checkpointing)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
