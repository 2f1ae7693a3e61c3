"""What the server does before round 1: load data and model, and start the method.

Nothing is written except caches.
"""

import time
from dataclasses import dataclass, replace

import numpy as np

from droppeft import seeds
from droppeft.client.client_model import ClientModel
from droppeft.client.run_inputs import Loaded, ReadData, Say, load, tokens_of
from droppeft.client.trial_step import try_one_step
from droppeft.config import Config
from droppeft.costs.device_profiles import make_fleet
from droppeft.data.checks import measured
from droppeft.data.findings import Findings
from droppeft.data.language import with_language
from droppeft.data.texts import Rows, TextTable
from droppeft.data.tokens import TokenRows
from droppeft.extras import require
from droppeft.federated_method import adapter_spec, local_training
from droppeft.layer_dropout import Calibration
from droppeft.messages.server_state import ServerState
from droppeft.methods import Method, Setup, method_named
from droppeft.models.quantization import check_installed
from droppeft.server.round_cost import clock_for, longest_step
from droppeft.server.worker_count import count_workers
from droppeft.tasks.metrics import Metric
from droppeft.tasks.registry import task_named
from droppeft.transports.base import Transport
from droppeft.transports.registry import transport_named
from droppeft.transports.workers import Workers

LENGTH_SAMPLE = 1000
"""Training rows whose lengths are measured before the first round."""


@dataclass(frozen=True)
class Prepared:
    """A server that is ready for round 1.

    Attributes:
        loaded: data, split and model.
        method: the run's federated method.
        setup: what the method's functions may read.
        state: the server's state before round 1.
        findings: what was found in the data, with the lengths of training rows.
        sample: indices of the test rows on which every round is evaluated.
        no_clock_reason: why there is no modelled clock; ``None`` if there is one.
        prepare_wall_s: seconds that the preparation took.
        why_fewer_workers: why fewer clients train at a time than was asked for; ``None`` if not.
        workers: the processes that evaluate the global model; ``None`` if this process does it.
    """

    loaded: Loaded
    method: Method
    setup: Setup
    state: ServerState
    findings: Findings
    sample: Rows
    no_clock_reason: str | None
    prepare_wall_s: float
    why_fewer_workers: str | None = None
    workers: Workers | None = None

    @property
    def test(self) -> TokenRows:
        """The tokenised test rows."""
        return self.loaded.test

    @property
    def config(self) -> Config:
        """The run's resolved configuration."""
        return self.loaded.config

    @property
    def model(self) -> ClientModel:
        """The model to which the global adapter is attached for evaluation."""
        return self.loaded.model

    @property
    def metric(self) -> Metric:
        """The task's primary metric."""
        return self.loaded.task.metrics[0]


def writes_texts(method: Method, config: Config) -> bool:
    """Whether a run ends with texts of its global model: the task generates, and there is one."""
    generates = task_named(config.task).generates and config.evaluation.generated > 0
    return generates and method.has_global_model(config)


def prepare(
    config: Config,
    say: Say,
    run: str = "",
    read: ReadData | None = None,
    calibration: Calibration | None = None,
) -> Prepared:
    """Load data and model and start the method.

    Args:
        config: resolved, and accepted by :func:`droppeft.methods.rules.check_settings`.
        say: called with each step, to show progress.
        run: name of the run, under which clients save their state.
        read: data that have been read, which are used if they are those of the configuration.
        calibration: what each layer is worth, if it has been measured.

    Raises:
        DroppeftError: something that the configuration names does not exist or does not fit.
    """
    start = time.perf_counter()
    method = method_named(config.method)
    transport_named(config.transport)
    check_installed(config.quantization)
    if writes_texts(method, config):
        require("llm", "evaluation.generated")  # not only when the run ends
    fleet = make_fleet(config.clock, config.clients, config.seed)
    loaded = load(config, say, read)
    config, model = loaded.config, loaded.model
    clock, no_clock_reason = clock_for(config, fleet, loaded.backbone)
    count = count_workers(config, clock, model.num_layers)
    loaded = replace(loaded, workers=count.number)
    setup = Setup(
        config,
        model.num_layers,
        model.fresh_tensors,
        model.layout,
        clock,
        run,
        longest_step(config, loaded.backbone),
        calibration or _calibrated(loaded, say),
    )
    state = method.init(setup)
    say("tokenising")
    try_one_step(model, loaded.test, local_training(config), state.model.adapter)
    return Prepared(
        loaded=loaded,
        method=method,
        setup=setup,
        state=state,
        findings=_with_lengths(loaded),
        sample=evaluation_sample(len(loaded.test), config.evaluation.rows),
        no_clock_reason=no_clock_reason,
        prepare_wall_s=time.perf_counter() - start,
        why_fewer_workers=count.why_fewer,
    )


def _calibrated(loaded: Loaded, say: Say) -> Calibration | None:
    """Measure what each layer is worth, if rows were set aside for it.

    All layers have an adapter, whichever the method trains.
    """
    if not len(loaded.set_aside):
        return None
    say("measuring what each layer is worth")
    config, model = loaded.config, loaded.model
    table = tokens_of(loaded, loaded.data.train.take(loaded.set_aside))
    spec = adapter_spec(config.adapter, model.num_layers)
    return model.calibrate(spec, table, local_training(config))


def with_workers(prepared: Prepared, transport: Transport) -> Prepared:
    """Return the server with the processes of its transport, if it has some, for evaluations."""
    return replace(prepared, workers=transport if isinstance(transport, Workers) else None)


def _with_lengths(loaded: Loaded) -> Findings:
    """What was found in the data, with lengths and language of a sample of the training rows."""
    train, config = loaded.data.train, loaded.config
    if not len(train):
        return loaded.findings
    rng = seeds.numpy_generator(0, purpose="length sample")
    rows = rng.permutation(len(train))[:LENGTH_SAMPLE]
    sample, tokenizer = train.take(rows), loaded.backbone.tokenizer
    findings = loaded.findings
    if isinstance(sample, TextTable):
        findings = with_language(findings, sample.texts, tokenizer)
    lengths = loaded.task.full_lengths(sample, tokenizer, config)
    possible = loaded.backbone.max_length - (config.adapter.tokens or 0)
    return measured(findings, lengths, config.training.max_length, possible)


def evaluation_sample(test_rows: int, wanted: int) -> Rows:
    """Choose the test rows on which rounds are evaluated, the same for all runs on these data.

    Args:
        test_rows: number of test rows.
        wanted: number of rows to choose; all if there are fewer.
    """
    rng = seeds.numpy_generator(0, purpose="evaluation sample")
    return np.sort(rng.permutation(test_rows)[:wanted]).astype(np.int64)


def references(loaded: Loaded) -> dict[str, float | None]:
    """Values to compare with, of models that are no language models."""
    return loaded.task.references(loaded.data, loaded.clients)
