"""Causal language modelling: learning to write the completion of a prompt, or a text. Ours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from droppeft.config import Config
from droppeft.data.conversation_sources import load_conversations, load_test_conversations
from droppeft.data.conversation_tokens import (
    IGNORED,
    EncodedText,
    encode_conversations,
    pad_encoded,
)
from droppeft.data.conversations import ConversationData, ConversationTable
from droppeft.data.partition import ClientRows
from droppeft.data.site_rows import SiteRows, SiteSource, read_site_conversations
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenRows
from droppeft.models.causal_lm import HEADS, load_causal_lm, load_causal_lm_config
from droppeft.models.loading import Backbone, BackboneConfig
from droppeft.models.precision import DTYPES
from droppeft.models.quantization import copy_dequantised_values
from droppeft.tasks.completion_loss import CompletionLoss, head_loss, last_hidden_states
from droppeft.tasks.metrics import LOSS, PERPLEXITY, TOKEN_ACCURACY, Metric
from droppeft.tasks.task import Batch, BatchResult, model_inputs

LEARNT_SHARE = 0.3
"""Share of a row's tokens that are learnt where there are no data: about that of instructions with
answers. The operations of the head are proportional to it."""


@dataclass(frozen=True)
class CausalLM:
    """Causal language modelling with one model on one device.

    Attributes:
        inputs: names of the token columns that the model takes.
        pad_token_id: token that pads short rows.
        device: torch device of the batches.
    """

    inputs: tuple[str, ...]
    pad_token_id: int
    device: torch.device

    def collate(self, table: EncodedText, rows: Rows) -> Batch:
        """Return a batch of rows, padded to the longest.

        It has ``input_ids`` and ``attention_mask``, both (B, S). ``positions`` (N,) are the places
        of the tokens before those that are learnt, counted over the flattened batch, and ``labels``
        (N,) are the tokens that are learnt.
        """
        arrays = pad_encoded(table, rows, self.pad_token_id)
        following = np.full_like(arrays["labels"], IGNORED)
        following[:, :-1] = arrays.pop("labels")[:, 1:]
        positions = np.flatnonzero(following != IGNORED)
        arrays |= {"positions": positions, "labels": following.ravel()[positions]}
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy of the tokens that are learnt, in fp32."""
        return self._of(model, batch).loss / self.targets(batch)

    def targets(self, batch: Batch) -> int:
        """Return the number of tokens that are learnt."""
        return len(batch["labels"])

    def evaluate(self, model: nn.Module, batch: Batch) -> BatchResult:
        """Evaluate a batch; ``observed`` is the number of tokens that the model predicts."""
        found = self._of(model, batch)
        return BatchResult(float(found.loss), self.targets(batch), int(found.correct))

    def losses_by_row(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses of each row's tokens (B,), and the number of these (B,)."""
        states, rows = self._states(model, batch), batch["input_ids"].shape[0]
        owners = batch["positions"] // batch["input_ids"].shape[1]
        losses = [
            head_loss(model, states[owners == row], batch["labels"][owners == row]).loss
            for row in range(rows)
        ]
        return torch.stack(losses), torch.bincount(owners, minlength=rows)

    def metrics(self, results: Sequence[BatchResult]) -> dict[str, float]:
        """Return the mean loss of a token, the perplexity, and the token accuracy."""
        targets = sum(result.targets for result in results)
        loss = sum(result.loss_sum for result in results) / targets
        return {
            "loss": loss,
            "perplexity": math.inf if loss >= MOST_LOSS else math.exp(loss),
            "token_accuracy": sum(result.observed for result in results) / targets,
        }

    def sample_batch(self, rows: int, length: int) -> Batch:
        """Return a batch as :meth:`collate` makes it, in which the last tokens are learnt."""
        column = torch.ones(rows, length, dtype=torch.int64, device=self.device)
        learnt = _learnt(length)
        places = torch.arange(rows * length, device=self.device).view(rows, length)
        positions = places[:, length - 1 - learnt : length - 1].flatten()
        return {
            "input_ids": column,
            "attention_mask": column.clone(),
            "positions": positions,
            "labels": torch.ones_like(positions),
        }

    def _of(self, model: nn.Module, batch: Batch) -> CompletionLoss:
        return head_loss(model, self._states(model, batch), batch["labels"])

    def _states(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the states (N, H) from which the N tokens that are learnt are predicted."""
        length = batch["input_ids"].shape[1]
        # Virtual tokens of a prompt stand before the batch's tokens.
        hidden = last_hidden_states(model, model_inputs(batch))[:, -length:]
        return hidden.flatten(0, 1)[batch["positions"]]


MOST_LOSS = 700.0
"""A larger loss has no finite perplexity in double precision."""


def _learnt(length: int) -> int:
    """Return how many tokens of a row of a length are learnt where there are no data."""
    return max(1, round(LEARNT_SHARE * (length - 1)))


class CausalLMTask:
    """The task ``causal_lm``; see :class:`~droppeft.tasks.task.Task`."""

    name = "causal_lm"
    metrics: tuple[Metric, ...] = (LOSS, PERPLEXITY, TOKEN_ACCURACY)
    adapter_task = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM
    heads: tuple[str, ...] = HEADS
    calibration_rows = 16
    rows_are_targets = False
    generates = True

    def read(self, config: Config) -> ConversationData:
        """Read prompts with completions, conversations or texts."""
        if config.partition.kind == "sites":
            return load_test_conversations(config.data, config.source)
        return load_conversations(config.data, config.source, config.partition.key)

    def read_site(self, site: SiteSource, classes: Sequence[str] | None) -> SiteRows:
        """Read conversations or texts of a site."""
        return read_site_conversations(site)

    def load_backbone(
        self,
        config: Config,
        label_names: Sequence[str],
        seed: int,
        *,
        dequantised: bool = False,
    ) -> Backbone:
        """Load a causal language model, which has no new head."""
        dtype = DTYPES[config.training.computed_in]
        if not dequantised:
            return load_causal_lm(config.model, seed, config.quantization, dtype)
        plain = load_causal_lm(config.model, seed, dtype=dtype)
        plain.model.float()
        if config.quantization == "none":
            return plain
        backbone = load_causal_lm(config.model, seed, config.quantization)
        copy_dequantised_values(backbone.model, plain.model)
        return replace(plain, weights_hash=backbone.weights_hash)

    def load_backbone_config(self, name: str, label_names: Sequence[str]) -> BackboneConfig:
        """Load the configuration of a causal language model."""
        return BackboneConfig(load_causal_lm_config(name), ())

    def encode(self, table: ConversationTable, tokenizer: Any, config: Config) -> EncodedText:
        """Tokenise rows with the model's chat template."""
        return encode_conversations(
            table, tokenizer, config.training.max_length, config.training.loss_on
        )

    def full_lengths(self, table: ConversationTable, tokenizer: Any, config: Config) -> Rows:
        """Return the number of tokens of each row with the model's chat template."""
        return self.encode(table, tokenizer, config).full_lengths

    def labelled(self, rows: TokenRows, classes: int, rng: np.random.Generator) -> EncodedText:
        """Return rows of tokens of which the last ones are learnt."""
        labels = rows.columns["input_ids"].copy()
        for start, end in pairwise(rows.offsets):
            labels[start : end - _learnt(end - start)] = IGNORED
        return EncodedText(rows.columns, rows.offsets, labels, rows.lengths, 0)

    def on(self, inputs: tuple[str, ...], pad_token_id: int, device: torch.device) -> CausalLM:
        """Return the task for a model that takes these token columns."""
        return CausalLM(inputs, pad_token_id, device)

    def references(
        self, corpus: ConversationData, clients: Sequence[ClientRows]
    ) -> dict[str, float | None]:
        """Return nothing: the model before training is the reference."""
        return {}
