"""A model that is already trained on its task, with a few steps in plain torch."""

import csv
from pathlib import Path

import pytest
import torch

from droppeft.models.loading import load_backbone
from runs import TOPICS


@pytest.fixture(scope="session")
def trained_model(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model, trained to classify the topics of the tiny data."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    start, data = (setting.partition("=")[2] for setting in tiny_overrides[:2])
    names = sorted(TOPICS)
    with (Path(data) / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    backbone = load_backbone(start, names, seed=0)
    tokenizer, model = backbone.tokenizer, backbone.model.train()
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([names.index(row["label"]) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(20):
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
