"""Tiny models with random weights, one per supported architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from tiny import FAMILIES

LAYERS = 4
_COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 3,
    "initializer_range": 0.3,
}
_DEBERTA = FAMILIES["deberta-v2"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert"},
    "roberta": {"model_type": "roberta"},
    "xlm-roberta": {"model_type": "xlm-roberta"},
    "deberta-v3": {"model_type": "deberta-v2", **_DEBERTA},
    "deberta-v2-conv": {"model_type": "deberta-v2", **_DEBERTA, "conv_kernel_size": 3},
    "gpt2": {"model_type": "gpt2"},
    "llama": {"model_type": "llama"},
}


def tiny_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(**{**_COMMON, **ARCHITECTURES[architecture], **changes})


def tiny_model(architecture: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(architecture, **changes)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """Function ``build(architecture, **configuration)`` for a reproducible sequence classifier."""
    return tiny_model


@pytest.fixture
def model(architecture: str) -> nn.Module:
    return tiny_model(architecture)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of 7 tokens; the second has padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 40, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])}
