"""A training step that is tried before a run begins. Ours."""

import numpy as np
import torch

from droppeft.client.client_model import ClientModel
from droppeft.data.tokens import TokenRows
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import Mode
from droppeft.messages.instruction import AdapterSpec, LocalTraining
from droppeft.training.loop import Step, train


def try_one_step(
    model: ClientModel, table: TokenRows, settings: LocalTraining, spec: AdapterSpec
) -> None:
    """Try one training step with learning rate 0, to find out early whether the settings work.

    Not every model and adapter can be trained in half precision or with checkpointing. In fp32
    without checkpointing no step is taken.

    Args:
        model: keeps the values that it has.
        table: the step uses its first rows.

    Raises:
        DroppeftError: the step failed.
    """
    if settings.precision == "fp32" and not settings.checkpointing:
        return
    model.attach(spec)
    model.load_layers()
    batch = model.task.collate(table, np.arange(min(2, len(table))))
    step = Step([batch], (Mode.TRAIN,) * model.num_layers, rate_factor=0.0)
    try:
        with torch.random.fork_rng():
            train(model.trainable(model.parameters), [step], settings)
    except RuntimeError as error:
        kind = next(layer.type for layer in spec.layers if layer)
        checkpointing = str(settings.checkpointing).lower()
        raise DroppeftError(
            f"adapter.type={kind} on this model cannot be trained with "
            f"training.precision={settings.precision} and training.checkpointing={checkpointing} "
            f"({str(error).strip().partition(chr(10))[0]}); use fp32 and false, or another type"
        ) from None
