"""The training table: local training on a client."""

from typing import Any, Literal

from pydantic import Field, model_validator

from droppeft.config.exclusive import EXCLUSIVE, with_default
from droppeft.config.table import Real, Table, Whole

DEFAULT_LOCAL_STEPS = 10
Precision = Literal["fp32", "bf16", "fp16"]
"""Number formats of frozen weights and products."""


class TrainingConfig(Table):
    """Local training on a client."""

    local_steps: Whole | None = Field(
        None, ge=1, description="optimizer steps per local training (10 if neither is given)"
    )
    local_epochs: Whole | None = Field(
        None, ge=1, description="instead of local_steps: passes over the client's rows"
    )
    batch_size: Whole = Field(16, ge=1, description="rows per optimizer step")
    micro_batch_size: Whole | None = Field(
        None,
        ge=1,
        description="rows per forward and backward pass, of which a step takes as many as its "
        "batch needs, adding up their gradients; smaller values take less memory (the whole batch "
        "if not given)",
    )
    learning_rate: Real = Field(
        1e-3, gt=0, description="AdamW's peak learning rate for the adapters"
    )
    head_learning_rate: Real = Field(
        1e-2, gt=0, description="the same for the head's last linear map, which is not pretrained"
    )
    loraplus_lr_ratio: Real = Field(
        1.0,
        gt=0,
        description="LoRA+: the learning rate of LoRA's B, as a multiple of `learning_rate`, which "
        "A keeps",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="schedule of both learning rates over the whole run"
    )
    warmup_fraction: Real = Field(
        0.05, ge=0, lt=1, description="share of the run in which the learning rates warm up"
    )
    weight_decay: Real = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    clip_norm: Real = Field(1.0, gt=0, description="largest global gradient norm")
    proximal: Real = Field(
        0.0,
        ge=0,
        description="FedProx: weight mu of (mu/2)·‖trained − received‖² in a client's loss",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="number format of frozen weights and of products; adapters, the trained head, "
        "loss and optimizer stay fp32, and `fp16` scales the loss. `auto`: `bf16` where the server "
        "has fast products in it (GPUs, processors with AVX512-BF16 or AMX), else `fp32`; the "
        "run's config.toml has the choice",
    )
    backbone_dropout: bool = Field(
        False,
        description="whether dropout modules of the frozen backbone drop values in training, with "
        "the probabilities of its configuration; those of adapters and head always do",
    )
    checkpointing: bool = Field(
        False,
        description="gradient checkpointing: store only the inputs of the layers that run, and "
        "recompute the rest in the backward pass; the result is the same",
    )
    offload: bool = Field(
        False,
        description="leave weights of layers that do not run in a local training in a "
        "memory-mapped file, off the accelerator; for `frozen.layers` with cache, or "
        "`dropout.every=round`",
    )
    max_length: Whole = Field(128, ge=4, description="tokens after which a text is truncated")
    loss_on: Literal["completion", "all"] = Field(
        "completion",
        description="for `causal_lm`: the tokens that are learnt, `completion` (every answer, with "
        "the token that ends it) or `all`",
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_unless_said(cls, value: Any) -> Any:
        return with_default(value, EXCLUSIVE["training"], DEFAULT_LOCAL_STEPS)

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "TrainingConfig":
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("give only one of training.local_steps and training.local_epochs")
        return self

    @property
    def rows_at_once(self) -> int:
        """Rows of a forward and backward pass."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)

    @property
    def computed_in(self) -> Precision:
        """The precision, once ``auto`` has been replaced by :func:`droppeft.config.resolve`."""
        if self.precision == "auto":
            raise ValueError("training.precision=auto has not been resolved")
        return self.precision
