"""Layer dropout in transformers' Trainer, and in what is made of it, such as TRL's SFTTrainer.

Source: ours. The only module of this package that needs more than torch.
"""

from contextlib import ExitStack
from typing import Any, Unpack

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.alone import DrawnGates, GateOptions, complete, layer_dropout


class LayerDropoutCallback(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Drop layers while a Trainer trains: ``Trainer(..., callbacks=[LayerDropoutCallback(0.5)])``.

    A draw per optimizer step (``state.global_step``), the same for all batches that it accumulates;
    evaluation, prediction and generation run every layer. A run that is resumed from a checkpoint
    draws what the unbroken run would have drawn. The mean number of layers that ran is logged as
    ``active_layers`` beside the training loss.

    With ``fp16=True`` the Trainer counts a step that its loss scaler skips, and so do the gates:
    the next batch runs other layers, and a resumed run the same ones. (Without a GPU the Trainer
    of transformers 5.23 passes ``fp16`` over and trains in fp32.)

    ``torch_compile=True`` compiles what lies between the gates, the blocks one by one.

    Several processes drop the same layers, which DistributedDataParallel must be told to expect:
    the Trainer does so, but for a checkpointed model without adapters, where
    ``ddp_find_unused_parameters=True`` is needed.

    The gates are put before the blocks when training begins and removed when it ends. The Trainer
    tells nobody when training *raises*: then they stay until the next training with this callback,
    until :meth:`remove`, or until the callback is freed. Evaluation runs every layer all the same.

    Args:
        mean, options: as in :func:`~droppeft.layer_dropout.layer_dropout`, where they are checked
            when training begins. ``total_steps`` is the Trainer's; ``seed`` is the Trainer's unless
            it is given.

    Raises:
        DroppeftError: when training begins, see there; or with several GPUs in one process.
        TypeError: an option that does not exist.
    """

    def __init__(self, mean: float | None = None, **options: Unpack[GateOptions]) -> None:
        if "total_steps" in options:
            raise TypeError("total_steps is the Trainer's: set max_steps or num_train_epochs there")
        complete(options)
        self._mean, self._options = mean, options
        self._context = ExitStack()
        self._dropout: DrawnGates | None = None
        self._forget()

    @property
    def dropout(self) -> DrawnGates | None:
        """Layer dropout at work; ``None`` outside of training."""
        return self._dropout

    def remove(self) -> None:
        """Take the gates away, if there are any."""
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
        """Put the gates before the blocks."""
        self.remove()
        _refuse(args)
        options: GateOptions = {"seed": args.seed, **self._options}
        options["total_steps"] = state.max_steps
        self._dropout = self._context.enter_context(
            layer_dropout(model, None, self._mean, **options)
        )
        self._forget()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the gates of one optimizer step."""
        if self._dropout is not None:
            self._dropout.step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how many layers the step ran."""
        if self._dropout is not None:
            self._ran += sum(self._dropout.active)
            self._steps += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add the mean number of layers of the steps since the last log."""
        if "loss" in logs and self._steps:
            logs["active_layers"] = self._ran / self._steps
            # The Trainer has copied `logs` into its history already.
            state.log_history[-1]["active_layers"] = logs["active_layers"]
            self._forget()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the gates away."""
        self.remove()

    def _forget(self) -> None:
        self._ran = self._steps = 0


def _refuse(args: Any) -> None:
    """Refuse a way to run a model in which gates in front of blocks do not work."""
    if args.n_gpu > 1:
        raise DroppeftError(
            f"this process sees {args.n_gpu} GPUs, over which the Trainer would copy the model in "
            "every step; start one process per GPU, with torchrun or accelerate launch"
        )
