"""Layer dropout in a plain PyTorch loop, without federation.

Fine-tunes the built-in model with LoRA on a few of the built-in texts; each step drops exactly 3 of
the 6 layers, never the first.
"""

import random

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from droppeft.config import SourceConfig
from droppeft.data.sources import load_text
from droppeft.layer_dropout import find_blocks, gated, layer_rates, sample_active
from droppeft.models import load_backbone

STEPS, ROWS = 20, 16


def main() -> None:
    """Train for some steps and print loss and depth."""
    data = load_text("builtin", SourceConfig())
    backbone = load_backbone("builtin", data.label_names, seed=0)
    model = get_peft_model(backbone.model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16))
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)

    _, blocks = find_blocks(model)
    rates = layer_rates(0.5, "uniform", len(blocks), protected={0})
    gate_rng, row_rng = random.Random(0), np.random.default_rng(0)
    model.train()
    with gated(blocks) as gates:
        for step in range(STEPS):
            rows = row_rng.choice(len(data.train), ROWS, replace=False)
            texts = [data.train.texts[row] for row in rows]
            batch = backbone.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            gates.active = sample_active(rates, "exact", gate_rng)
            labels = torch.from_numpy(data.train.labels[rows])
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1:2}  loss {loss.item():.3f}  layers {sum(gates.active)} of 6")
    model.eval()  # outside of the context every layer runs


if __name__ == "__main__":
    main()
