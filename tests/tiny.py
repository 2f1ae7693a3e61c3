"""Models small enough to train in a test, with the built-in tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from droppeft.models.packaged import builtin_model_folder

FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 1},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
    "llama": {},
}
"""Settings of each architecture's configuration in addition to the sizes."""


def tiny_model(num_layers: int = 4, model_type: str = "bert", vocab_size: int = 64) -> Any:
    """Return a sequence classifier for two classes with reproducible random weights."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        **FAMILIES[model_type],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config)


def save_tiny_model(folder: Path, num_layers: int = 4, model_type: str = "bert") -> Path:
    """Save a tiny model and the built-in tokenizer in a folder for ``load_backbone``."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
    tiny_model(num_layers, model_type, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
