"""Layer dropout for transformers' Trainer and its subclasses, such as TRL's SFTTrainer.

Source: ours. This is the only module of the package that needs more than torch.
"""

from contextlib import ExitStack
from typing import Any, Unpack

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.dropout import DrawnGates, layer_dropout
from droppeft.layer_dropout.modes import Mode
from droppeft.layer_dropout.options import GateOptions, with_defaults


class LayerDropoutCallback(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Drop layers while a Trainer trains: ``Trainer(..., callbacks=[LayerDropoutCallback(0.5)])``.

    New gates are drawn for each optimizer step (``state.global_step``) and hold for all batches
    that are accumulated for it, and for all forwards of the loss. Evaluation, prediction and
    generation run every layer. A run that is resumed from a checkpoint draws the same gates as an
    uninterrupted run. The mean numbers of layers that ran and that were trained are logged as
    ``active_layers`` and ``trained_layers``, together with the training loss.

    It also works in the trainers of TRL and sentence-transformers; the documentation has a table.
    In DPO and GRPO, the reference must be the trained model without its adapter, so that both run
    the same layers; other references are refused. If GRPO uses a generation in several optimizer
    steps (``num_iterations``, ``steps_per_generation``), ``every`` must hold the layers for as many
    steps.

    With ``fp16=True``, the Trainer also counts a step that its loss scaler skips, and so do the
    gates: the next batch runs other layers, and a resumed run drops the same layers. (Without a
    GPU, the Trainer of transformers 5.23 ignores ``fp16`` and trains in fp32.)

    ``torch_compile=True`` compiles each block, and the code between the gates.

    All processes of a distributed run drop the same layers. DistributedDataParallel must be told to
    expect unused parameters. The Trainer does so, except for a checkpointed model without adapters:
    set ``ddp_find_unused_parameters=True`` for it.

    The gates are installed when training begins and removed when it ends. If training raises an
    error, the Trainer does not notify its callbacks: the gates then stay until the next training
    with this callback, until :meth:`remove` is called, or until the callback is garbage-collected.
    Evaluation runs every layer even then.

    Args:
        mean: mean drop rate; see :func:`~droppeft.layer_dropout.layer_dropout`. It can be left out
            if ``backward_depths`` are given.
        options: the other options of :func:`~droppeft.layer_dropout.layer_dropout`, which are
            checked when training begins. ``total_steps`` is taken from the Trainer and cannot be
            given. ``seed`` defaults to the Trainer's seed.

    Raises:
        DroppeftError: when training begins, as :func:`~droppeft.layer_dropout.layer_dropout`, if
            the process has several GPUs, or if the loss would compare forwards of different layers;
            before an optimizer step, if a layer that it does not train has a gradient.
        TypeError: if an option does not exist or is ``total_steps``.
    """

    def __init__(self, mean: float | None = None, **options: Unpack[GateOptions]) -> None:
        if "total_steps" in options:
            raise TypeError(
                "total_steps is taken from the Trainer; set max_steps or num_train_epochs there"
            )
        with_defaults(options)
        self._mean, self._options = mean, options
        self._context = ExitStack()
        self._dropout: DrawnGates | None = None
        self._reset_counts()

    @property
    def dropout(self) -> DrawnGates | None:
        """The current state of layer dropout; ``None`` outside training."""
        return self._dropout

    def remove(self) -> None:
        """Remove the gates, if there are any."""
        self._dropout = None
        self._context.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Install the gates."""
        self.remove()
        _check_devices(args)
        _check_reference(args, model)
        options: GateOptions = {"seed": args.seed, **self._options}
        options["total_steps"] = state.max_steps
        _check_reuse(args, with_defaults(options)["every"], state.global_step)
        self._dropout = self._context.enter_context(
            layer_dropout(model, None, self._mean, **options)
        )
        self._reset_counts()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the gates of one optimizer step."""
        if self._dropout is not None:
            self._dropout.step = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that only trained layers have gradients, and that the reference ran as they did.

        Raises:
            DroppeftError: see :meth:`DrawnGates.check_gradients`, or if the reference is a model of
                its own.
        """
        if self._dropout is not None:
            self._dropout.check_gradients()
            if (
                hasattr(args, "precompute_ref_log_probs")
                and not self._dropout.ran_without_gradients
            ):
                raise DroppeftError(_another_reference(args))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record how many layers the step ran and trained."""
        if self._dropout is not None:
            self._ran += sum(self._dropout.active)
            self._trained += sum(mode is Mode.TRAIN for mode in self._dropout.modes)
            self._steps += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add how many layers ran and were trained per step since the last log."""
        if "loss" in logs and self._steps:
            means = {
                "active_layers": self._ran / self._steps,
                "trained_layers": self._trained / self._steps,
            }
            logs |= means
            # The Trainer has copied `logs` into its history already.
            state.log_history[-1] |= means
            self._reset_counts()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the gates."""
        self.remove()

    def _reset_counts(self) -> None:
        self._ran = self._trained = self._steps = 0


def _check_devices(args: Any) -> None:
    """Refuse DataParallel: gates do not work in the copies of the model that it makes."""
    if args.n_gpu > 1:
        raise DroppeftError(
            f"this process has {args.n_gpu} GPUs, and the Trainer would copy the model to each of "
            "them in every step; start one process per GPU, with torchrun or accelerate launch"
        )


def _check_reference(args: Any, model: nn.Module) -> None:
    """Refuse TRL's trainers (DPO, KTO, GRPO, RLOO) if their reference is not the gated model.

    With an adapter, the reference is the same model with the adapter switched off, and runs the
    same layers. Otherwise it is a copy, or its results were computed before the training.
    """
    compares = hasattr(args, "precompute_ref_log_probs")
    compares |= hasattr(args, "num_iterations") and getattr(args, "beta", 0) != 0
    adapted = any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)
    if compares and (not adapted or getattr(args, "precompute_ref_log_probs", False)):
        raise DroppeftError(_another_reference(args))


def _another_reference(args: Any) -> str:
    if hasattr(args, "precompute_ref_log_probs"):
        remedy = ", without ref_model and with precompute_ref_log_probs=False"
    else:
        remedy = ", or set beta=0"
    return (
        f"the reference of {type(args).__name__} would run every layer and the trained model only "
        f"some, so they would differ before the first step; train an adapter (peft_config){remedy}"
    )


def _check_reuse(args: Any, every: int, first_step: int) -> None:
    """Refuse trainers (GRPO, RLOO) that reuse log-probabilities in steps with other layers."""
    batches = getattr(args, "num_iterations", 1) * getattr(args, "steps_per_generation", 1)
    accumulated = args.gradient_accumulation_steps
    if accumulated % batches == 0:
        return
    steps, rest = divmod(batches, accumulated)
    held = rest == 0 and every % steps == 0
    if held and first_step % steps == 0:
        return
    if held:
        remedy = f"resume from a checkpoint whose step is a multiple of {steps}"
    else:
        remedy = (
            f"set num_iterations=1 and steps_per_generation={accumulated}, as "
            "gradient_accumulation_steps"
        )
        remedy += f", or hold the layers for as many steps with every={steps}" if rest == 0 else ""
    raise DroppeftError(
        f"{type(args).__name__} would use the log-probabilities of a generation in {batches} "
        f"batches, and so in optimizer steps that run other layers; {remedy}"
    )
