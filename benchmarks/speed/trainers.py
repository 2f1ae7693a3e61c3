"""The same training by transformers' Trainer, or TRL's SFTTrainer, with peft."""

import tempfile
from dataclasses import dataclass
from typing import Any

import peft
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from benchmarks.speed.measuring import timed
from benchmarks.speed.our_training import OurTraining
from droppeft import seeds
from droppeft.data.tokens import TokenRows
from droppeft.models.precision import DTYPES


@dataclass(frozen=True)
class TrainerSettings:
    """What is changed in a Trainer that is otherwise as it comes.

    Attributes:
        by_length: batches of rows of similar length (`train_sampling_strategy`).
        bf16: autocast; `None` leaves the trainer's default.
        frozen: type of the frozen weights.
        dropout: whether the backbone's own dropout is on.
        checkpointing: gradient checkpointing; `None` leaves the trainer's default.
    """

    by_length: bool = False
    bf16: bool | None = None
    frozen: str = "fp32"
    dropout: bool = True
    checkpointing: bool | None = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of `TrainingArguments`."""
        found: dict[str, Any] = {}
        if self.by_length:
            found["train_sampling_strategy"] = "group_by_length"
        if self.bf16 is not None:
            found["bf16"] = self.bf16
        if self.checkpointing is not None:
            found["gradient_checkpointing"] = self.checkpointing
        return found


class TrainerTraining:
    """A model with LoRA as droppeft has it, on the same rows, steps and learning rate.

    Attributes:
        model: peft's model.
        precision: in which it is evaluated.
    """

    def __init__(self, ours: OurTraining, settings: TrainerSettings) -> None:
        config = ours.prepared.config
        self._task, self._tokenizer = config.task, ours.client.model.tokenizer
        self.model: Any = _model(ours, settings)
        self.precision = "bf16" if settings.bf16 or settings.frozen == "bf16" else "fp32"
        self._start = {
            name: value.detach().clone()
            for name, value in self.model.named_parameters()
            if value.requires_grad
        }
        chosen = ours.client.rows.train
        self._rows = _dataset(ours.client.table, chosen, config.task)
        self._arguments = {
            "per_device_train_batch_size": config.training.batch_size,
            "max_steps": config.training.local_steps,
            "learning_rate": config.training.learning_rate,
            "weight_decay": config.training.weight_decay,
            "lr_scheduler_type": "linear",
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings.arguments(),
        }

    def train(self) -> dict[str, float]:
        """Train from the first values on; return the time, and the mean loss of the steps."""
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                if name in self._start:
                    value.copy_(self._start[name])
        with tempfile.TemporaryDirectory() as folder:
            make = _sft_trainer if self._task == "causal_lm" else _trainer
            trainer = make(self.model, self._tokenizer, self._rows, folder, self._arguments)
            trainer.remove_callback(PrinterCallback)
            with timed() as took:
                loss: float = trainer.train().training_loss
        return {**took, "train_loss": loss}


def _model(ours: OurTraining, settings: TrainerSettings) -> Any:
    prepared = ours.prepared
    config = prepared.config.model_copy(
        update={"training": prepared.config.training.model_copy(update={"precision": "fp32"})}
    )
    head_seed = seeds.seed_for(config.seed, purpose="head")
    labels = prepared.loaded.data.label_names
    model: nn.Module = prepared.loaded.task.load_backbone(config, labels, head_seed).model
    lora = peft.LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        task_type="CAUSAL_LM" if config.task == "causal_lm" else "SEQ_CLS",
    )
    wrapped = peft.get_peft_model(model, lora)
    for module in wrapped.modules():
        if isinstance(module, nn.Dropout) and not settings.dropout:
            module.p = 0.0
    for value in wrapped.parameters():
        if not value.requires_grad:
            value.data = value.data.to(DTYPES[settings.frozen])
    return wrapped


def _dataset(table: TokenRows, rows: Any, task: str) -> Any:
    made: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    labels: Any = table.labels  # type: ignore[attr-defined]
    for row in rows:
        start, end = table.offsets[row : row + 2]
        made["input_ids"].append(table.columns["input_ids"][start:end].tolist())
        made["labels"].append(
            labels[start:end].tolist() if task == "causal_lm" else int(labels[row])
        )
    return Dataset.from_dict(made)


def _trainer(model: Any, tokenizer: Any, rows: Any, folder: str, arguments: dict[str, Any]) -> Any:
    return Trainer(
        model=model,
        args=TrainingArguments(folder, **arguments),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def _sft_trainer(
    model: Any, tokenizer: Any, rows: Any, folder: str, arguments: dict[str, Any]
) -> Any:
    from trl import SFTConfig, SFTTrainer

    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    return SFTTrainer(
        model=model,
        args=SFTConfig(folder, **arguments, **prepared),
        train_dataset=rows,
        processing_class=tokenizer,
    )
