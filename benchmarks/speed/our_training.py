"""A local training of droppeft in this process, as a client of a run does it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from droppeft.client.client import Client
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Update
from droppeft.models.hardware import resolve_here
from droppeft.server.prepare import Prepared, prepare
from droppeft.training.loop import evaluate

ONE_CLIENT = (
    *("method=fedlora", "clients=1", "cohort_size=1", "partition.kind=iid", "rounds=1"),
    "partition.min_rows=3",
    *("threads=1", "accelerator=cpu", "training.warmup_fraction=0", "training.weight_decay=0"),
    *("training.learning_rate=0.001", "training.head_learning_rate=0.001"),
)
"""LoRA in all layers, with the schedule, weight decay and single learning rate of a Trainer."""


@dataclass(frozen=True)
class OurTraining:
    """A client that is ready to train.

    Attributes:
        prepared: the server, with data and model.
        client: the only client.
        instruction: its instruction. Each run begins with the same values.
    """

    prepared: Prepared
    client: Client
    instruction: Instruction

    @property
    def model(self) -> nn.Module:
        """The model with the adapter that was trained last."""
        model: nn.Module = self.client.model.model
        return model

    def train(self) -> Update:
        """Take the steps of a local training."""
        answer = self.client.run(self.instruction)
        assert isinstance(answer, Update)
        return answer

    def test_loss(self, model: nn.Module, precision: str) -> float:
        """Loss of a model on all test rows."""
        test, task = self.prepared.test, self.client.model.task
        rows = self.prepared.sample
        return evaluate(model, test, rows, task, batch_size=16, precision=precision).loss


def our_training(words: Sequence[str], steps: int, batch_size: int) -> OurTraining:
    """Load data and model of a configuration.

    The client has as many rows to train on as the steps take, so that each is used once.

    Args:
        words: settings besides `ONE_CLIENT`.
        steps: of a local training.
        batch_size: rows of a step.
    """
    rows = -(-steps * batch_size * 5 // 4)  # a fifth are the client's rows to evaluate on
    sizes = (
        *(f"training.local_steps={steps}", f"training.batch_size={batch_size}"),
        *(f"source.max_train_rows={rows}", "source.max_test_rows=128", "evaluation.rows=128"),
    )
    config = resolve_here(load_config(None, [*ONE_CLIENT, *sizes, *words]))
    prepared = prepare(config, lambda what: None, f"{os.getpid():08x}")
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    [client] = clients_of(prepared.loaded)
    assert isinstance(client, Client)
    return OurTraining(prepared, client, instruction)
