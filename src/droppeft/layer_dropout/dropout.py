"""Layer dropout as a context manager, for any training loop.

Source: drawing new gates for every mini-batch is from DropPEFT (arXiv:2503.10217). Drawing them
once per optimizer step, also when gradients are accumulated over several forwards, is ours.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, Unpack

import torch
from torch import nn

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.blocks import Gates, gated
from droppeft.layer_dropout.modes import LayerModes, Mode, Modes, starts_of
from droppeft.layer_dropout.module_attributes import attributes_set, own_layerdrop_off
from droppeft.layer_dropout.options import GateOptions, whole_number, with_defaults
from droppeft.layer_dropout.rates import explicit_rates, layer_rates, protected_ends
from droppeft.layer_dropout.schedules import check_schedule, scheduled_rates
from droppeft.layer_dropout.stacks import find_stacks

Blocks = Sequence[nn.Module]


class DrawnGates:
    """The state of layer dropout on a model, as :func:`layer_dropout` yields it."""

    def __init__(self, gates: Gates, draw: Callable[[int], Modes], blocks: Blocks) -> None:
        self._gates = gates
        self._draw = draw
        self._trained = [_trainable(block) for block in blocks]
        self._generating = 0
        self.ran_without_gradients = False
        """Whether a forward of this step in training mode had no gradients, as a reference."""
        gates.always_open = self._runs_every_layer
        self.step = 0

    @property
    def step(self) -> int:
        """Number of the current optimizer step, from 0. Assign it to resume a run.

        It increases by 1 after each step of the optimizer that was passed to :func:`layer_dropout`,
        except after a step that torch's ``GradScaler`` skips.
        """
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        number = whole_number("the step", step)
        if number < 0:
            raise DroppeftError(f"the step is {number}; it must be 0 or more")
        modes = self._draw(number)
        self._step, self._gates.modes = number, modes
        self.ran_without_gradients = False

    @property
    def active(self) -> tuple[bool, ...]:
        """L gates; True for a layer that runs in the training forwards of this step."""
        return self._gates.active

    @property
    def modes(self) -> Modes:
        """The modes of the L layers in the training forwards of this step."""
        return self._gates.modes

    @property
    def executed(self) -> tuple[int, ...]:
        """Number of forwards that each of the L blocks has run so far, including evaluation."""
        return self._gates.executed

    def check_gradients(self) -> None:
        """Check that the layers that this step does not train have no gradients.

        The optimizer passed to :func:`layer_dropout` calls this before each of its steps, and
        :class:`~droppeft.layer_dropout.trainer.LayerDropoutCallback` before those of a Trainer.

        Raises:
            DroppeftError: such a layer has a gradient, with which the optimizer would change it.
        """
        for layer, (mode, trained) in enumerate(zip(self.modes, self._trained, strict=True)):
            if mode is Mode.TRAIN or all(parameter.grad is None for parameter in trained):
                continue
            what = "dropped" if mode is Mode.SKIP else "run forward only"
            if any(map(_filled_with_zeros, trained)):
                raise DroppeftError(
                    f"layer {layer} was {what}, but its gradients are zeros instead of None, so "
                    "the optimizer would still change it; call zero_grad with set_to_none=True, "
                    "torch's default"
                )
            raise DroppeftError(
                f"layer {layer} is {what} in step {self.step}, but has a gradient; either the "
                "gradients of another step were not cleared (zero_grad), or the loss depends on "
                "its weights or on a forward that ran it, such as one in evaluation mode (eval)"
            )

    def _at_full_depth(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that does the same with every layer."""

        @wraps(method)
        def at_full_depth(*args: Any, **kwargs: Any) -> Any:
            self._generating += 1
            try:
                return method(*args, **kwargs)
            finally:
                self._generating -= 1

        return at_full_depth

    def _runs_every_layer(self, block: nn.Module) -> bool:
        if self._generating or not block.training:
            return True
        self.ran_without_gradients |= not torch.is_grad_enabled()
        return False

    def _before_optimizer(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check the gradients now, or whenever the optimizer's closure has computed them."""
        itself, *rest = args
        closure = kwargs.get("closure", next(iter(rest), None))
        if closure is None:
            self.check_gradients()
            return args, kwargs

        def checked() -> Any:
            loss = closure()
            self.check_gradients()
            return loss

        return (itself, checked), {}

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # To skip a step, torch's GradScaler does not call `step` at all, except for fused
        # optimizers: it calls those and sets `found_inf`.
        if not getattr(optimizer, "found_inf", False):
            self.step += 1


@contextmanager
def layer_dropout(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    mean: float | None = None,
    **options: Unpack[GateOptions],
) -> Iterator[DrawnGates]:
    """Drop transformer layers during training inside this context.

    New gates are drawn for each optimizer step. All forwards between two optimizer steps run the
    same layers: accumulating gradients equals a larger batch, and all forwards of a loss use the
    same model, also those without gradients (``no_grad``), such as a reference. A layer that a step
    drops, or runs forward only, has no gradient (``None``), so the optimizer neither updates nor
    decays it; if it has one, the optimizer's step raises an error. Gradient checkpointing
    recomputes exactly the layers that ran.

    All layers run in evaluation mode (``model.eval()``) and in ``model.generate``. As for any
    dropout, ``no_grad`` alone does not switch to evaluation. A loss must not compare
    log-probabilities of different optimizer steps, which run different layers; ``every`` holds the
    layers for several steps. If the model drops layers by itself (``config.layerdrop``), this is
    switched off inside.

    At least one layer with trainable parameters runs in every step, unless parameters outside the
    blocks (such as a head) are trainable too. This is determined when the context is entered. The
    gates depend only on ``seed`` and on the step, so all processes of a distributed run drop the
    same layers.

    A step that torch's ``GradScaler`` skips because fp16 gradients overflowed is not counted: the
    next batch runs the same layers again. The steps that the optimizer takes therefore have the
    requested drop rates, even if some layers overflow more often than others.

    Args:
        model: a transformers model, wrapped by peft or not; see :func:`find_stacks`. The layers of
            an encoder-decoder model are numbered as one list of L layers, encoder first.
        optimizer: the optimizer whose steps are counted; the wrapper that accelerate's ``prepare``
            returns works as well. With ``None``, set ``step`` of the yielded object yourself,
            before each step, and call its ``check_gradients`` after the backward.
        mean: mean drop rate over all L layers, distributed over depth by ``shape``; see
            :func:`layer_rates`. It can be left out if ``backward_depths`` are given. The encoder
            and the decoder of an encoder-decoder model each have this mean, this shape and these
            protected layers.
        rates: drop rate of each of the L layers, instead of ``mean``, ``shape``, ``protect_first``
            and ``protect_last``. Default: ``None``.
        backward_depths: fractions of the L layers, counted from the last, that a step trains; each
            step draws one of them, each with the same probability. The layers below run forward
            only: their outputs are exact, nothing is stored for their backward, and they have no
            gradients, nor has what comes before them, such as embeddings. Default: ``(1.0,)``, all
            layers in every step.
        shape: distribution of the mean over depth, a key of :data:`SHAPES`. Default:
            ``"uniform"``.
        sampling: how gates are drawn from the rates, a key of :data:`SAMPLINGS`. Default:
            ``"exact"``.
        protect_first: number of layers nearest the input that are never dropped. Default: 1.
        protect_last: number of layers nearest the output that are never dropped. Default: 1.
        every: number of optimizer steps for which the same gates are used. Default: 1.
        schedule: how the rates change over the run, a key of :data:`SCHEDULES`. Default:
            ``"constant"``.
        schedule_part: share of the run that the schedule takes, in (0, 1]; see
            :func:`scheduled_rates`. Default: 0.3.
        total_steps: number of optimizer steps of the whole run; required by every schedule except
            ``"constant"``. Default: ``None``.
        seed: seed of the gates; torch's random generators are not used. Default: 0.

    Yields:
        A :class:`DrawnGates`, with the current step and its gates.

    Raises:
        DroppeftError: if the blocks of the model are not known, the rates or the schedule are
            impossible, the optimizer does not call step hooks, or a number that must be whole is
            not; inside the context, if a layer that a step does not train has gradients.
        TypeError: if an option does not exist.
    """
    chosen = with_defaults(options)
    stacks = find_stacks(model).values()
    blocks = [block for stack in stacks for block in stack]
    _check_depths(model, chosen["backward_depths"])
    draw = partial(
        modes_of_step,
        rates=_rates(mean, chosen, [len(stack) for stack in stacks]),
        options=chosen,
        need_one_of=_needed(model, blocks),
    )
    with gated(blocks) as gates, own_layerdrop_off(model), ExitStack() as undo:
        dropout = DrawnGates(gates, draw, blocks)
        for module, name in _generators(model):
            at_full_depth = dropout._at_full_depth(getattr(module, name))
            undo.enter_context(attributes_set(module, **{name: at_full_depth}))
        if optimizer is not None:
            inner = _hookable(optimizer)
            before = inner.register_step_pre_hook(dropout._before_optimizer)
            undo.callback(before.remove)
            undo.callback(inner.register_step_post_hook(dropout._after_optimizer).remove)
        yield dropout


def modes_of_step(
    step: int,
    rates: Sequence[float],
    options: GateOptions,
    need_one_of: Sequence[int] = (),
) -> Modes:
    """Draw the modes of a step. They depend only on the arguments.

    Args:
        step: number of the step, from 0. Steps after ``total_steps`` count as the end of the run.
        rates: L drop rates, before the schedule is applied.
        options: options of :func:`layer_dropout`. Only ``backward_depths``, ``sampling``,
            ``every``, ``schedule``, ``schedule_part``, ``total_steps`` and ``seed`` are used.
        need_one_of: layers of which at least one must be trained; see :func:`sample_active`.

    Raises:
        DroppeftError: if an option has an impossible value; see :func:`layer_dropout`.
    """
    chosen = with_defaults(options)
    step, seed = whole_number("the step", step), whole_number("seed", chosen["seed"])
    every, schedule = whole_number("every", chosen["every"]), chosen["schedule"]
    part = chosen["schedule_part"]
    if every < 1:
        raise DroppeftError(f"every is {every}; it must be 1 or more steps")
    check_schedule(schedule, part)
    draw = step // every
    progress = _progress(draw * every, schedule, chosen["total_steps"])
    modes = LayerModes(
        layers=len(rates),
        starts=starts_of(chosen["backward_depths"], len(rates)),
        rates=scheduled_rates(rates, schedule, progress, part),
        sampling=chosen["sampling"],
    )
    # Random hashes a string, so that consecutive steps and seeds give independent draws.
    return modes.draw(
        random.Random(f"starts|{seed}|{draw}"),
        random.Random(f"{seed}|{draw}"),
        need_one_of=need_one_of,
    )


def _check_depths(model: nn.Module, depths: Sequence[float]) -> None:
    """Refuse depths that are no fractions, or with which virtual tokens would not be trained."""
    try:
        starts_of(depths, 1)
    except TypeError:
        raise DroppeftError(
            f"backward_depths is {depths!r}; give a list of fractions, such as (1, 0.5)"
        ) from None
    adapter = getattr(model, "active_peft_config", None)
    if min(depths) < 1 and getattr(adapter, "is_prompt_learning", False):
        raise DroppeftError(
            "backward_depths below 1 need an adapter inside the layers, since virtual tokens are "
            "trained through all of them; leave backward_depths out, or use LoRA for example"
        )


def _rates(mean: float | None, options: GateOptions, depths: Sequence[int]) -> tuple[float, ...]:
    """Return the rate of every layer: as given, or the mean distributed over each stack."""
    given = options["rates"]
    if mean is None and given is None and any(depth < 1 for depth in options["backward_depths"]):
        mean = 0.0
    if (mean is None) == (given is None):
        raise DroppeftError(
            "layer dropout needs either a mean rate or the rates of all layers, not both; give "
            "one, or none of them with backward_depths below 1"
        )
    if given is None:
        first = whole_number("protect_first", options["protect_first"])
        last = whole_number("protect_last", options["protect_last"])
        given = _spread(mean or 0.0, options["shape"], depths, first, last)
    return explicit_rates(given, sum(depths))


def _spread(
    mean: float, shape: str, depths: Sequence[int], protect_first: int, protect_last: int
) -> list[float]:
    """Distribute the mean over the layers of each stack separately."""
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
            f"the schedule {schedule} depends on the length of the run; set total_steps to the "
            "number of optimizer steps, 1 or more"
        )
    return min(1.0, step / total_steps)


def _generators(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules with methods that generate, and the names of these methods."""
    for module in model.modules():
        for name in ("generate", "generate_batch"):
            if callable(getattr(type(module), name, None)):
                yield module, name


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _filled_with_zeros(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and not parameter.grad.any()


def _needed(model: nn.Module, blocks: Blocks) -> tuple[int, ...]:
    """Return the layers of which one must run; none if anything outside the blocks is trained."""
    trained = [_trainable(block) for block in blocks]
    inside = {parameter for parameters in trained for parameter in parameters}
    if any(parameter not in inside for parameter in _trainable(model)):
        return ()
    return tuple(layer for layer, parameters in enumerate(trained) if parameters)


def _hookable(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside accelerate's wrapper, which has no step hooks itself."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise DroppeftError(
            f"layer dropout cannot count the steps of {type(optimizer).__name__}, which is not a "
            "torch optimizer; pass None and set `step` of the yielded object before each step"
        )
    return inner
