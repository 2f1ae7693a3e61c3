"""Predict classes with the model of a run. Ours.

Texts are truncated and the model is computed as in the run's last evaluation, so that the same rows
get the same classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from droppeft.adapters.base_delta import base_delta_applied
from droppeft.client.global_model import attach_model
from droppeft.client.run_inputs import Say
from droppeft.config import Config
from droppeft.data.new_texts import as_table
from droppeft.data.tokens import ordered_batches, tokenise
from droppeft.errors import DroppeftError
from droppeft.models.loading import check_tokens
from droppeft.models.precision import autocast
from droppeft.runs.export import load_source, saved_model
from droppeft.runs.model_cards import Source
from droppeft.tasks.classification import Classification
from droppeft.tasks.registry import task_named

Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Predictor:
    """A model that classifies.

    Attributes:
        source: the model of a run, with its adapter attached.
        model: the backbone with the adapter.
        task: batches and logits.
    """

    source: Source
    model: nn.Module
    task: Classification

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the C classes."""
        return self.source.label_names

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.source.config

    def probabilities(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        advance: Callable[[int], object] = lambda rows: None,
    ) -> Probabilities:
        """Return the probability of each class for each text, shape (N, C).

        Args:
            texts: N texts.
            pairs: the second text of each row, for a model of pairs of texts.
            advance: called with the number of rows of each batch, to show progress.

        Raises:
            DroppeftError: a text has no tokens or one that the model does not know, or the model's
                outputs are not finite.
        """
        found = np.empty((len(texts), len(self.label_names)))
        if not texts:
            return found
        config, tokenizer = self.config, self.source.backbone.tokenizer
        table = tokenise(as_table(texts, pairs), tokenizer, config.training.max_length)
        check_tokens(self.model, int(table.columns["input_ids"].max()))
        rows = np.arange(len(table), dtype=np.int64)
        self.model.eval()
        with base_delta_applied(self.model, self.source.model.base_delta), torch.inference_mode():
            for chosen in ordered_batches(rows, table.lengths, config.evaluation.batch_size):
                batch = self.task.collate(table, chosen)
                with autocast(config.training.precision, self.task.device):
                    logits = self.task.logits(self.model, batch)
                found[chosen] = logits.double().softmax(dim=-1).cpu().numpy()
                advance(len(chosen))
        if not np.isfinite(found).all():
            raise DroppeftError(
                "the model's outputs are not finite, because its training diverged; predict with "
                "another round, or train again with a lower training.learning_rate"
            )
        return found


def load_predictor(
    run: Path, say: Say, round: int | None = None, client: int | None = None
) -> Predictor:
    """Load the model of a run to classify texts.

    Args:
        run: folder of a run, which may be finished, stopped, or running in another process.
        say: called with each step, to show progress.
        round: of the checkpoint; ``None`` as in :func:`~droppeft.runs.export.saved_model`.
        client: whose model is loaded; ``None`` for the global one.

    Raises:
        DroppeftError: as :func:`~droppeft.runs.export.export_run`, or the run's model writes texts.
    """
    config, checkpoint = saved_model(run, round, client)
    if task_named(config.task).generates:
        raise DroppeftError(
            f"{run}: its model was trained for task={config.task}, which writes texts; use generate"
        )
    cuda = config.accelerator == "cuda" and torch.cuda.is_available()
    accelerator = "cuda" if cuda else "cpu"
    source = load_source(run.resolve(), config, checkpoint, client, False, say, accelerator)
    attach_model(source.client_model, source.model)
    task = source.client_model.task
    assert isinstance(task, Classification)
    return Predictor(source, source.client_model.model, task)
