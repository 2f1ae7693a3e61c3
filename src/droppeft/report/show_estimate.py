"""What ``droppeft estimate`` prints: combinations that fit, or the nearest one, or JSON."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.quantities import bytes_text, counted
from droppeft.report.progress import bar
from droppeft.resources.device_limits import Limits
from droppeft.resources.estimate import Option, counted_on, least_savings, option

SCHEMA_VERSION = 1

SETTINGS: dict[str, Callable[[Option], str]] = {
    "model": lambda one: re.split("[:/]", one.config.model.rstrip("/"))[-1],
    "adapter": lambda one: one.config.adapter.type,
    "batch": lambda one: str(one.config.training.batch_size),
    "length": lambda one: str(one.config.training.max_length),
    "rate": lambda one: "–" if one.config.dropout.mean is None else f"{one.config.dropout.mean:g}",
    "frozen": lambda one: str(one.config.frozen.layers),
    "precision": lambda one: one.config.training.precision,
    "bits": lambda one: _bits(one.config),
    "ckpt": lambda one: "yes" if one.config.training.checkpointing else "no",
    "offload": lambda one: "yes" if one.config.training.offload else "no",
}
"""Columns of the table, and how a cell is written."""


def _bits(config: Config) -> str:
    """In how many bits a frozen weight of a linear layer is held."""
    plain = "32" if config.training.precision == "fp32" else "16"
    return config.quantization.removesuffix("bit").replace("none", plain)


@dataclass(frozen=True)
class Answer:
    """All combinations that were considered.

    Attributes:
        limits: of the device.
        profile: name of the device profile, or ``None``.
        options: combinations that a run accepts, with their costs.
        refused: how many combinations a run refuses, by error message.
    """

    limits: Limits
    profile: str | None
    options: Sequence[Option]
    refused: Mapping[str, int]

    @property
    def fitting(self) -> list[Option]:
        """Options within the limits."""
        return [one for one in self.options if one.excess(self.limits) <= 1]

    @property
    def nearest(self) -> Option:
        """The option that exceeds the limits least, or is farthest below them."""
        return min(self.options, key=lambda one: one.excess(self.limits))


def consider(
    configs: Sequence[Config], limits: Limits, profile: str | None, console: Console
) -> Answer:
    """Estimate the costs of all combinations, with a progress bar if ``console`` is a terminal.

    Raises:
        DroppeftError: a run would refuse all of them.
    """
    options: list[Option] = []
    refused: Counter[str] = Counter()
    with bar(console) as progress:
        task = progress.add_task("combinations", total=len(configs))
        for config in configs:
            try:
                options.append(option(config, limits.profile))
            except DroppeftError as error:
                refused[str(error)] += 1
            progress.advance(task)
    if not options:
        raise DroppeftError(next(iter(refused)))
    return Answer(limits, profile, options, refused)


def as_json(answer: Answer) -> str:
    """All combinations, with memory by part in bytes; ``shown`` marks those of the table."""
    shown = {id(one) for one in least_savings(answer.fitting)}
    return json.dumps(
        {
            "schema_version": SCHEMA_VERSION,
            "memory_bytes": answer.limits.memory_bytes,
            "step_s": answer.limits.step_s,
            "profile": answer.profile,
            "nearest": _plain(answer.nearest, answer.limits),
            "refused": dict(answer.refused),
            "combinations": [
                {**_plain(one, answer.limits), "shown": id(one) in shown} for one in answer.options
            ],
        }
    )


def show(answer: Answer, console: Console, *, everything: bool) -> None:
    """Print the table; the command is never wrapped, so that it can be pasted."""
    fitting = answer.fitting
    shown = fitting if everything else least_savings(fitting)
    if shown:
        console.print(_heading(answer, shown), style="italic", highlight=False)
        console.print(_table(answer, shown))
        console.print(_summary(answer, len(shown)), style="dim", highlight=False)
        console.print(Text("\nthe first of them:", style="bold"))
        console.print(_command(shown[0]), soft_wrap=True, style="cyan", highlight=False)
    else:
        console.print(_nothing(answer), highlight=False)
        console.print(_command(answer.nearest), soft_wrap=True, style="cyan", highlight=False)
    if answer.refused:
        count, reason = sum(answer.refused.values()), next(iter(answer.refused))
        text = f"{count} combinations left out because a run refuses them, for instance: {reason}"
        console.print(text, style="yellow", highlight=False)


def _command(one: Option) -> str:
    return f"  droppeft run {shlex.join(one.overrides)}"


def _heading(answer: Answer, shown: Sequence[Option]) -> str:
    """Settings that are the same in all rows, and the limits."""
    title = " · ".join(f"{name} {SETTINGS[name](shown[0])}" for name in _alike(shown))
    return f"{title}\nfits {_limits(answer)}"


def _alike(shown: Sequence[Option]) -> list[str]:
    return [name for name, cell in SETTINGS.items() if len({cell(one) for one in shown}) == 1]


def _table(answer: Answer, shown: Sequence[Option]) -> Table:
    alike = _alike(shown)
    columns = {name: cell for name, cell in SETTINGS.items() if name not in alike}
    columns["trained"] = lambda one: f"{one.active}/{one.num_layers}"
    columns["memory"] = lambda one: bytes_text(one.memory.total)
    columns["headroom"] = lambda one: bytes_text(answer.limits.memory_bytes - one.memory.total)
    if answer.profile is not None:
        columns["step"] = lambda one: f"{one.step_s:.2f} s"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        left = name in ("model", "adapter")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for one in shown:
        table.add_row(*(cell(one) for cell in columns.values()))
    return table


def _summary(answer: Answer, shown: int) -> str:
    fitting = len(answer.fitting)
    least = "" if shown == fitting else f", shown: {shown}, with no more savings than necessary"
    fit = "fits" if fitting == 1 else "fit"
    kernels = counted_on(answer.options[0].config)
    return (
        f"{fitting} of {counted(len(answer.options), 'combination')} {fit}{least}. "
        "trained: layers that a step trains, at most; ckpt: gradient checkpointing. All modelled, "
        f"activations as on {kernels}; "
        "memory that malloc does not return is not counted (docs/reference/cost_estimates.md)."
    )


def _nothing(answer: Answer) -> str:
    one, time = answer.nearest, ""
    if one.step_s is not None:
        time = f" and {one.step_s:.2f} s per step"
    return (
        f"None of {counted(len(answer.options), 'combination')} fits {_limits(answer)} "
        "(modelled).\n"
        f"The nearest one needs {bytes_text(one.memory.total)}{time}:"
    )


def _limits(answer: Answer) -> str:
    limits = answer.limits
    time = "" if limits.step_s is None else f" and {limits.step_s:g} s per step"
    profile = f" on {answer.profile}" if answer.profile else ""
    return f"{bytes_text(limits.memory_bytes)}{time}{profile}"


def _plain(one: Option, limits: Limits) -> dict[str, Any]:
    return {
        "settings": dict(setting.split("=", 1) for setting in one.overrides),
        "num_layers": one.num_layers,
        "trained_layers": one.active,
        "memory_bytes": {**asdict(one.memory), "total": one.memory.total},
        "headroom_bytes": limits.memory_bytes - one.memory.total,
        "step_modelled_s": one.step_s,
        "fits": one.excess(limits) <= 1,
    }
