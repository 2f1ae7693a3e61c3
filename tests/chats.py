"""A run of the task ``causal_lm`` that takes a second: its data, its model, and its settings."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chat_tokenizer import CHATML, chat_tokenizer

LAYERS = 4
ANSWERS = {"one": "yes", "two": "no", "many": "hello world"}
"""The completion of a prompt follows from its first word."""

SETTINGS = (
    "method=droppeft",
    "clients=4",
    "cohort_size=2",
    "rounds=2",
    "training.local_steps=2",
    "training.batch_size=4",
    "training.max_length=48",
    "partition.min_rows=6",
    "threads=1",
    "workers=1",
    "accelerator=cpu",
    "evaluation.rows=8",
    "evaluation.final_rows=10",
    "evaluation.generated=2",
    "evaluation.max_new_tokens=4",
    "dropout.mean=0.25",
)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chat_data(folder: Path) -> Path:
    """Write train.jsonl (80 rows) and test.jsonl (20), with columns prompt and completion."""
    draw = random.Random(0)

    def row() -> dict[str, str]:
        kind = draw.choice(sorted(ANSWERS))
        words = draw.choices(("what", "is", "it", "answer", "test"), k=draw.randint(1, 6))
        return {"prompt": " ".join((kind, *words)), "completion": ANSWERS[kind]}

    for split, rows in (("train", 80), ("test", 20)):
        write_lines(folder / f"{split}.jsonl", (row() for _ in range(rows)))
    return folder


def tiny_llama(vocab_size: int, layers: int = LAYERS, **settings: Any) -> Any:
    """Return a Llama with reproducible random weights, whose next tokens differ clearly."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
        **{"bos_token_id": 3, "eos_token_id": 2, **settings},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def save_chat_model(folder: Path, template: str | None = CHATML, **settings: Any) -> Path:
    """Save a tiny Llama, and a ChatML tokenizer that pads with the token that ends a turn."""
    tokenizer = chat_tokenizer(template)
    tiny_llama(**{"vocab_size": len(tokenizer), **settings}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_settings(folder: Path) -> list[str]:
    """Save a tiny model and its data in a folder, and return the settings of a run with them."""
    model, data = save_chat_model(folder / "model"), folder / "data"
    data.mkdir()
    return [f"model={model}", f"data={write_chat_data(data)}", *SETTINGS]
