"""Layer dropout that draws its gates by itself, for any training loop.

Source: a draw per mini-batch is DropPEFT's (arXiv:2503.10217). That the mini-batch is the
optimizer's, however many forwards it is accumulated from, is ours: one step, one depth.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.blocks import Gates, find_stacks, gated, untraced
from droppeft.layer_dropout.gates import sample_active
from droppeft.layer_dropout.rates import explicit_rates, layer_rates, protected_ends
from droppeft.layer_dropout.schedules import check_schedule, scheduled_rates

Blocks = Sequence[nn.Module]


class GateOptions(TypedDict, total=False):
    """Keyword arguments of :func:`layer_dropout`, where each is explained."""

    rates: Sequence[float] | None
    shape: str
    sampling: str
    protect_first: int
    protect_last: int
    every: int
    schedule: str
    schedule_part: float
    total_steps: int | None
    seed: int


DEFAULTS = GateOptions(
    rates=None,
    shape="uniform",
    sampling="exact",
    protect_first=1,
    protect_last=1,
    every=1,
    schedule="constant",
    schedule_part=0.3,
    total_steps=None,
    seed=0,
)
"""What :func:`layer_dropout` takes where nothing is given."""


def complete(options: GateOptions) -> GateOptions:
    """The options, with the defaults of those that are not given.

    Raises:
        TypeError: an option that does not exist.
    """
    for name in options.keys() - DEFAULTS.keys():
        raise TypeError(f"layer_dropout() got an unexpected keyword argument {name!r}")
    return {**DEFAULTS, **options}


class DrawnGates:
    """Layer dropout at work on a model: what :func:`layer_dropout` yields."""

    def __init__(
        self, gates: Gates, draw: Callable[[int], tuple[bool, ...]], blocks: Blocks
    ) -> None:
        self._gates = gates
        self._draw = draw
        self._trained = [_trainable(block) for block in blocks]
        self._answers = list(gates.active)
        self.step = 0

    @property
    def step(self) -> int:
        """The optimizer step that is being prepared, from 0; assign it to go on with a run.

        It advances by itself after each step of the optimizer that :func:`layer_dropout` got; not
        after one that torch's ``GradScaler`` skips.
        """
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        if step < 0:
            raise DroppeftError(f"a run cannot be at step {step}; the first step is 0")
        self._step = step
        self._active = self._draw(step)
        self._executed_before = self.executed

    @property
    def active(self) -> tuple[bool, ...]:
        """L gates, True for a layer that runs in this step's training forwards."""
        return self._active

    @property
    def executed(self) -> tuple[int, ...]:
        """How many forwards each of the L blocks ran so far, evaluation included."""
        return self._gates.executed

    def _answer(self, layer: int, block: nn.Module, inputs: object) -> None:
        """Open or close one gate; called right before its block."""
        # Whoever checkpoints several blocks together runs them a second time in the backward: they
        # answer as before, even if the first time had no gradients (reentrant checkpointing).
        if torch._C._current_graph_task_id() != -1:
            return
        trains = block.training and torch.is_grad_enabled()
        self._answers[layer] = self._active[layer] or not trains
        self._gates.active = self._answers

    def _before_optimizer(self, *_: object) -> None:
        """Refuse gradients of zeros, with which momentum and decay would move a dropped layer."""
        counts = zip(self.executed, self._executed_before, strict=True)
        for layer, (now, before) in enumerate(counts):
            if now == before and any(map(_filled_with_zeros, self._trained[layer])):
                raise DroppeftError(
                    f"layer {layer} was dropped, but its gradients are zeros, with which an "
                    "optimizer moves and decays it; call zero_grad with set_to_none=True, torch's "
                    "default"
                )

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # Of other optimizers torch's GradScaler does not even call the step that it skips; a fused
        # one it calls, with this beside it.
        if not getattr(optimizer, "found_inf", False):
            self.step += 1


@contextmanager
def layer_dropout(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    mean: float | None = None,
    **options: Unpack[GateOptions],
) -> Iterator[DrawnGates]:
    """Drop layers in every training forward inside of this context, anew for each optimizer step.

    A *step* is one of the optimizer: all forwards between two of its steps run the same layers, so
    that accumulating gradients is the same as having a larger batch, both halves of a contrastive
    loss see one model, and what a step drops has no gradient (``None``: it is neither moved nor
    decayed). Gradient checkpointing recomputes what ran. A block in evaluation mode, or called
    without gradients (``no_grad``, ``inference_mode``, ``generate``), always runs.

    At least one layer with something to train runs in every step, unless something outside of the
    blocks is trained as well (a head); which this is, is looked up on entering. Gates follow from
    ``seed`` and the step alone, so that all processes of a distributed run drop the same layers.

    A step that torch's ``GradScaler`` skips, because gradients overflowed in fp16, is none: the
    next batch runs the same layers. So the steps that are taken have the rates that were asked for,
    even if some layers overflow more easily than others, and ``step`` counts what the optimizer
    counts.

    Args:
        model: a transformers model, wrapped by peft or not, as :func:`find_stacks` takes it. The L
            layers of an encoder and a decoder count in this order, as one list.
        optimizer: whose steps count, also as accelerate's ``prepare`` returns it. ``None``: set
            ``step`` of what the context yields before each step, yourself.
        mean: mean drop rate over all L layers, spread by ``shape``; see :func:`layer_rates`. An
            encoder and a decoder have this mean, this shape and these protected ends each.
        options: ``rates``, instead of the mean, the shape and the protection: the rate of each
            layer. ``shape``: a key of :data:`SHAPES`. ``sampling``: a key of :data:`SAMPLINGS`.
            ``protect_first``, ``protect_last``: so many layers nearest the input and the output are
            never dropped. ``every``: for how many steps one draw holds. ``schedule``: a key of
            :data:`SCHEDULES`; any but ``constant`` needs ``total_steps``, the optimizer steps of
            the whole run. ``schedule_part``: the share of the run that the schedule takes; see
            :func:`scheduled_rates`. ``seed``: of the gates alone. Defaults: :data:`DEFAULTS`.

    Yields:
        The :class:`DrawnGates` at work.

    Raises:
        DroppeftError: a model without known blocks, rates or a schedule that cannot be, an
            optimizer that calls no hooks; inside, gradients of zeros at a dropped layer.
    """
    chosen = complete(options)
    stacks = find_stacks(model).values()
    blocks = [block for stack in stacks for block in stack]
    draw = partial(
        gates_of_step,
        rates=_rates(mean, chosen, [len(stack) for stack in stacks]),
        options=chosen,
        need_one_of=_needed(model, blocks),
    )
    with gated(blocks) as gates, ExitStack() as hooks:
        dropout = DrawnGates(gates, draw, blocks)
        for layer, block in enumerate(blocks):
            answer = partial(untraced(dropout._answer), layer)
            hooks.callback(block.register_forward_pre_hook(answer).remove)
        if optimizer is not None:
            inner = _hookable(optimizer)
            before = inner.register_step_pre_hook(dropout._before_optimizer)
            hooks.callback(before.remove)
            hooks.callback(inner.register_step_post_hook(dropout._after_optimizer).remove)
        yield dropout


def gates_of_step(
    step: int,
    rates: Sequence[float],
    options: GateOptions,
    need_one_of: Sequence[int] = (),
) -> tuple[bool, ...]:
    """Draw the gates of a step from the seed and the step alone.

    Args:
        step: from 0; steps beyond ``total_steps`` count as the end of the run.
        rates: L drop rates, before the schedule.
        options: as of :func:`layer_dropout`; of them sampling, every, the schedule and the seed.
        need_one_of: as in :func:`sample_active`.

    Returns:
        L gates, True for a layer that runs.

    Raises:
        DroppeftError: as :func:`layer_dropout`.
    """
    chosen = complete(options)
    every, schedule, part = chosen["every"], chosen["schedule"], chosen["schedule_part"]
    if every < 1:
        raise DroppeftError(f"gates cannot hold for {every} steps; every must be 1 or more")
    check_schedule(schedule, part)
    draw = step // every
    progress = _progress(draw * every, schedule, chosen["total_steps"])
    now = scheduled_rates(rates, schedule, progress, part)
    # A text as seed is hashed, so that neighbouring steps and seeds are unrelated.
    rng = random.Random(f"{chosen['seed']}|{draw}")
    return sample_active(now, chosen["sampling"], rng, need_one_of=need_one_of)


def _rates(mean: float | None, options: GateOptions, depths: Sequence[int]) -> tuple[float, ...]:
    """The rate of every layer: as it is given, or the mean spread over each stack."""
    given = options["rates"]
    if (mean is None) == (given is None):
        raise DroppeftError("give layer dropout either a mean rate or the rates of all layers")
    if given is None:
        ends = options["protect_first"], options["protect_last"]
        given = _spread(mean or 0.0, options["shape"], depths, *ends)
    return explicit_rates(given, sum(depths))


def _spread(
    mean: float, shape: str, depths: Sequence[int], protect_first: int, protect_last: int
) -> list[float]:
    """Spread the mean over the layers of every stack by itself."""
    rates: list[float] = []
    for depth in depths:
        ends = protected_ends(depth, protect_first, protect_last)
        rates += layer_rates(mean, shape, depth, protected=ends)
    return rates


def _progress(step: int, schedule: str, total_steps: int | None) -> float:
    if schedule == "constant":
        return 0.0
    if total_steps is None or total_steps < 1:
        raise DroppeftError(
            f"the schedule {schedule} needs to know how long the run is; "
            "give total_steps, 1 or more optimizer steps"
        )
    return min(1.0, step / total_steps)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _filled_with_zeros(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and not parameter.grad.any()


def _needed(model: nn.Module, blocks: Blocks) -> tuple[int, ...]:
    """Layers of which one must run for anything to be trained; none if something else is."""
    trained = [_trainable(block) for block in blocks]
    inside = {parameter for parameters in trained for parameter in parameters}
    if any(parameter not in inside for parameter in _trainable(model)):
        return ()
    return tuple(layer for layer, parameters in enumerate(trained) if parameters)


def _hookable(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer itself; accelerate's wrapper calls its step but has no hooks."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise DroppeftError(
            f"layer dropout cannot see when {type(optimizer).__name__} takes a step; give None "
            "instead, and set `step` of what the context yields before each step"
        )
    return inner
