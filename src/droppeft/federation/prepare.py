"""Everything before round 1: data, devices, model, transport; nothing is written but caches."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from droppeft import seeds
from droppeft.config import Config
from droppeft.data.cache import cache_dir
from droppeft.data.partition import partition_rows
from droppeft.data.reference import majority_accuracy, tfidf_accuracy
from droppeft.data.sources import load_text
from droppeft.data.tables import Rows, TextData
from droppeft.data.tokens import TokenTable, tokenise
from droppeft.errors import DroppeftError
from droppeft.federation.device import Workbench
from droppeft.federation.transport import Site, Transport, transport_named
from droppeft.methods import Method, Setup, method_named
from droppeft.models import Backbone, load_backbone
from droppeft.plans import ServerState

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for round 1.

    Attributes:
        config: resolved.
        data: texts and labels.
        backbone: as loaded; the site's bench has an adapter on it.
        site: devices and their rows.
        method, setup, transport: what the round loop needs.
        state: before round 1.
        test: tokenised test rows.
        sample: test rows of a round's evaluation.
        prepare_wall_s: what all this took.
    """

    config: Config
    data: TextData
    backbone: Backbone
    site: Site
    method: Method
    setup: Setup
    transport: Transport
    state: ServerState
    test: TokenTable
    sample: Rows
    prepare_wall_s: float


def prepare(config: Config, say: Say) -> Prepared:
    """Load, split and tokenise the data, load the model, start the method.

    Args:
        config: resolved; its thread count is set before the first tensor is made.
        say: told what is being done, for people.

    Raises:
        DroppeftError: whatever the configuration names does not exist or does not fit.
    """
    start = time.perf_counter()
    method, transport = method_named(config.method), transport_named(config.transport)
    torch.set_num_threads(config.threads)
    say("reading data")
    data = load_text(config.data, config.source, config.partition.key)
    devices = partition_rows(
        data.train.labels, data.train.keys, config.devices, config.partition, config.seed
    )
    say("loading model")
    head_seed = seeds.seed_for(config.seed, purpose="head")
    backbone = load_backbone(config.model, data.label_names, head_seed)
    _check_length(config.training.max_length, backbone)
    bench = Workbench(backbone, config.accelerator, config.seed)
    setup = Setup(config, bench.num_layers, bench.fresh_tensors, bench.layout)
    state = method.init(setup)
    say("tokenising")
    train, test = (
        tokenise(table, backbone.tokenizer, config.training.max_length, cache_dir())
        for table in (data.train, data.test)
    )
    site = Site(config, bench, train, devices)
    return Prepared(
        config=config,
        data=data,
        backbone=backbone,
        site=site,
        method=method,
        setup=setup,
        transport=transport(site),
        state=state,
        test=test,
        sample=evaluation_sample(len(test), config.evaluation.rows),
        prepare_wall_s=time.perf_counter() - start,
    )


def _check_length(max_length: int, backbone: Backbone) -> None:
    if max_length > backbone.max_length:
        raise DroppeftError(
            f"training.max_length={max_length} is more than the {backbone.max_length} positions "
            f"of model {backbone.path}; lower it"
        )


def evaluation_sample(test_rows: int, wanted: int) -> Rows:
    """Test rows that every round of every run on this data is measured on."""
    rng = seeds.numpy_generator(0, purpose="evaluation sample")
    return np.sort(rng.permutation(test_rows)[:wanted]).astype(np.int64)


def identity(prepared: Prepared) -> dict[str, str]:
    """Hashes of what a resumed run must find as it was: texts, their split, the backbone."""
    split = hashlib.sha256()
    for rows in prepared.site.devices:
        for part in (rows.train, rows.validation, rows.test):
            split.update(part.tobytes() + b"|")
    return {
        "data_hash": prepared.data.content_hash,
        "split_hash": split.hexdigest()[:16],
        "model_hash": prepared.backbone.weights_hash,
    }


def references(data: TextData) -> dict[str, float | None]:
    """What a reader compares with: the most frequent class, and TF-IDF with a linear SVM."""
    return {
        "majority_accuracy": majority_accuracy(data),
        "tfidf_accuracy": tfidf_accuracy(data),
    }
