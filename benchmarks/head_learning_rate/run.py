"""Why the task head has a learning rate of its own: centralised training on the built-in data.

    python -m benchmarks.head_learning_rate.run

Three ways to train the built-in model with LoRA at full depth, three seeds each, interleaved: one
learning rate for everything, the head at ten times the rate, and the pooler trained as well.
Accuracy on the built-in test texts after 50, 100 and 200 steps of 16 texts goes to
`study.json`. About 8 minutes on 2 cores.
"""

from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from benchmarks.study import about, write_values
from droppeft import seeds
from droppeft.adapters.attach import attach
from droppeft.adapters.by_layer import count_parameters, trainable_by_layer
from droppeft.config import Config, SourceConfig
from droppeft.data.cache import cache_dir
from droppeft.data.sources import load_text
from droppeft.data.texts import TextData
from droppeft.data.tokens import tokenise
from droppeft.federated_method import local_training
from droppeft.layer_dropout import find_blocks
from droppeft.layer_dropout.modes import Mode
from droppeft.messages.instruction import AdapterSpec, Budget, LayerAdapter
from droppeft.models.loading import load_backbone
from droppeft.tasks.classification import Classification
from droppeft.training.loop import Step, Trainable, evaluate, train, training_batches

NAME = "head_learning_rate"
SEEDS, STEPS = (0, 1, 2), (50, 100, 200)
VARIANTS: dict[str, dict[str, Any]] = {
    "one rate, 2e-3": {"rates": (2e-3, 2e-3), "pooler": False},
    "head at 1e-2, adapters at 1e-3": {"rates": (1e-3, 1e-2), "pooler": False},
    "one rate, 2e-3, pooler trained": {"rates": (2e-3, 2e-3), "pooler": True},
}


def accuracies(data: TextData, seed: int, rates: tuple[float, float], pooler: bool) -> list[float]:
    """Accuracy after each of STEPS; AdamW starts afresh there, as between local trainings."""
    backbone = load_backbone("builtin", data.label_names, seeds.seed_for(seed, purpose="head"))
    layer = LayerAdapter("lora", rank=8)
    spec = AdapterSpec((layer,) * backbone.num_layers, alpha=16.0)
    model = attach(backbone.model, spec, backbone.blocks_path, seed)
    for name, value in model.named_parameters():
        if pooler and ".pooler." in name:
            value.requires_grad_(True)
    path, blocks = find_blocks(model)
    parameters = trainable_by_layer(model, path)
    print(f"{count_parameters(parameters):,} trainable", end=" ", flush=True)
    task = Classification(backbone.inputs, backbone.tokenizer.pad_token_id, torch.device("cpu"))
    train_table, test_table = (
        tokenise(table, backbone.tokenizer, 128, cache_dir()) for table in (data.train, data.test)
    )
    chosen = {"learning_rate": rates[0], "head_learning_rate": rates[1]}
    settings = local_training(Config.model_validate({"training": chosen}))
    rng = np.random.default_rng(seed)
    rows = training_batches(
        np.arange(len(train_table)), train_table, 16, Budget(steps=STEPS[-1]), rng
    )
    torch.manual_seed(seed)
    found = []
    for start, stop in zip((0, *STEPS), STEPS, strict=False):
        every = (Mode.TRAIN,) * len(blocks)
        steps = [
            Step([task.collate(train_table, chosen)], every, 1.0) for chosen in rows[start:stop]
        ]
        train(Trainable(model, blocks, parameters, task), steps, settings)
        everything = np.arange(len(test_table))
        found.append(evaluate(model, test_table, everything, task, 64).metrics["accuracy"])
    print([round(value, 3) for value in found], flush=True)
    return found


def main() -> None:
    """Run all variants and seeds, interleaved, and write the result file."""
    torch.set_num_threads(2)
    data = load_text("builtin", SourceConfig())
    raw: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for seed in SEEDS:
        for name, variant in VARIANTS.items():
            print(seed, name, end=": ", flush=True)
            raw[name].append(accuracies(data, seed, **variant))
    summary = {
        name: [
            {"steps": steps, "mean": mean(values), "sd": stdev(values)}
            for steps, values in zip(STEPS, zip(*runs, strict=True), strict=True)
        ]
        for name, runs in raw.items()
    }
    content = {
        **about(NAME),
        "seeds": SEEDS,
        "variants": VARIANTS,
        "summary": summary,
        "raw": raw,
        "data_hash": data.content_hash,
    }
    write_values(NAME, content)


if __name__ == "__main__":
    main()
