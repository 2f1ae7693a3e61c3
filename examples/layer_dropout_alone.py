"""Layer dropout in a plain PyTorch loop, without federation.

Fine-tunes the built-in model with LoRA on some of the built-in texts. Each step drops exactly 3 of
the 6 layers, never the first or the last.
"""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from droppeft.config import SourceConfig
from droppeft.data.sources import load_text
from droppeft.layer_dropout import layer_dropout
from droppeft.models.loading import load_backbone

STEPS, ROWS = 20, 16


def main() -> None:
    """Train for some steps and print the loss and the number of layers that ran."""
    data = load_text("builtin", SourceConfig())
    backbone = load_backbone("builtin", data.label_names, seed=0)
    model = get_peft_model(backbone.model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16))
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)

    rng = np.random.default_rng(0)
    model.train()
    with layer_dropout(model, optimizer, mean=0.5, seed=0) as dropout:
        for step in range(STEPS):
            rows = rng.choice(len(data.train), ROWS, replace=False)
            texts = [data.train.texts[row] for row in rows]
            batch = backbone.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            labels = torch.from_numpy(data.train.labels[rows])
            loss = model(**batch, labels=labels).loss
            loss.backward()
            print(f"step {step + 1:2}  loss {loss.item():.3f}  layers {sum(dropout.active)} of 6")
            optimizer.step()  # draws the layers of the next step
            optimizer.zero_grad()
    model.eval()  # all layers run, also inside the context


if __name__ == "__main__":
    main()
