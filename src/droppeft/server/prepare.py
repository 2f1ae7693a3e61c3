"""Everything before round 1 on the server; nothing is written but caches."""

import time
from dataclasses import dataclass

import numpy as np

from droppeft import seeds
from droppeft.client.client import rehearse
from droppeft.client.client_model import ClientModel
from droppeft.client.run_inputs import Loaded, Say, load, tokens_of
from droppeft.config import Config
from droppeft.costs.device_profiles import make_fleet
from droppeft.data.reference import majority_accuracy, own_majority_accuracy, tfidf_accuracy
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenTable
from droppeft.federated_method import local_training
from droppeft.messages import ServerState
from droppeft.methods import Method, Setup, method_named
from droppeft.models.quantization import check_installed
from droppeft.server.round_cost import clock_for, longest_step
from droppeft.transports.registry import transport_named


@dataclass(frozen=True)
class Prepared:
    """A server that is ready for round 1.

    Attributes:
        loaded: texts, split and model.
        method, setup: what the round loop needs.
        state: before round 1.
        test: tokenised test rows.
        sample: test rows of a round's evaluation.
        without_clock: why there is no modelled clock, ``None`` if there is one.
        prepare_wall_s: what all this took.
    """

    loaded: Loaded
    method: Method
    setup: Setup
    state: ServerState
    test: TokenTable
    sample: Rows
    without_clock: str | None
    prepare_wall_s: float

    @property
    def config(self) -> Config:
        """Of the run, resolved."""
        return self.loaded.config

    @property
    def model(self) -> ClientModel:
        """To which the global adapter is attached."""
        return self.loaded.model


def prepare(config: Config, say: Say, run: str = "") -> Prepared:
    """Load texts and model, start the method.

    Args:
        config: resolved, and one that :func:`droppeft.methods.rules.check_settings` lets pass.
        say: told what is being done, for people.
        run: names it where clients keep something for it.

    Raises:
        DroppeftError: whatever the configuration names does not exist or does not fit.
    """
    start = time.perf_counter()
    method = method_named(config.method)
    transport_named(config.transport)
    check_installed(config.quantization)
    fleet = make_fleet(config.clock, config.clients, config.seed)
    loaded = load(config, say)
    config, model = loaded.config, loaded.model
    clock, without_clock = clock_for(config, fleet, loaded.backbone)
    setup = Setup(
        config,
        model.num_layers,
        model.fresh_tensors,
        model.layout,
        clock,
        run,
        longest_step(config, loaded.backbone),
    )
    state = method.init(setup)
    say("tokenising")
    test = tokens_of(loaded, loaded.data.test)
    rehearse(model, test, local_training(config), state.model.adapter)
    return Prepared(
        loaded=loaded,
        method=method,
        setup=setup,
        state=state,
        test=test,
        sample=evaluation_sample(len(test), config.evaluation.rows),
        without_clock=without_clock,
        prepare_wall_s=time.perf_counter() - start,
    )


def evaluation_sample(test_rows: int, wanted: int) -> Rows:
    """Test rows that every round of every run on this data is measured on."""
    rng = seeds.numpy_generator(0, purpose="evaluation sample")
    return np.sort(rng.permutation(test_rows)[:wanted]).astype(np.int64)


def references(loaded: Loaded) -> dict[str, float | None]:
    """What a reader compares with: most frequent classes, and TF-IDF with a linear SVM."""
    return {
        "majority_accuracy": majority_accuracy(loaded.data),
        "own_majority_accuracy": own_majority_accuracy(loaded.data, loaded.clients),
        "tfidf_accuracy": tfidf_accuracy(loaded.data),
    }
