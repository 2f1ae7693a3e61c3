"""A whole run: settings outside tables, and those of the data."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from droppeft.config.adapter import AdapterConfig
from droppeft.config.backward import BackwardConfig
from droppeft.config.clock import ClockConfig
from droppeft.config.configurator import ConfiguratorConfig
from droppeft.config.defaults import (
    DEFAULT_CLIENTS,
    DEFAULT_COHORT_SIZE,
    DEFAULT_METHOD,
    DEFAULT_TASK,
    with_defaults,
)
from droppeft.config.ditto import DittoConfig
from droppeft.config.dropout import CALIBRATED, DropoutConfig
from droppeft.config.evaluation import EvaluationConfig
from droppeft.config.flower import FlowerConfig
from droppeft.config.frozen import FrozenConfig
from droppeft.config.privacy import PrivacyConfig
from droppeft.config.server import ServerConfig
from droppeft.config.sharing import SharingConfig
from droppeft.config.table import Real, Table, TextList, Whole
from droppeft.config.traffic import TrafficConfig
from droppeft.config.training import TrainingConfig

Kind = Literal["iid", "dirichlet", "dirichlet_by_client", "pathological", "natural", "sites"]
DEFAULT_KIND: Literal["dirichlet"] = "dirichlet"


class SourceConfig(Table):
    """Which columns, splits and rows of the data are read."""

    text: TextList | None = Field(
        None, description="text column, or two columns for text pairs (found by name if not given)"
    )
    label: str | None = Field(
        None,
        description="label column (found by name if not given); for conversations, a column of "
        "categories by which `partition` can distribute them",
    )
    prompt: str | None = Field(
        None, description="for conversations: column of the prompts, with `source.completion`"
    )
    completion: str | None = Field(
        None, description="for conversations: column of the completions, with `source.prompt`"
    )
    train: str | None = Field(None, description="name of the training split (found if not given)")
    test: str | None = Field(None, description="name of the test split (found if not given)")
    max_train_rows: Whole | None = Field(
        None, ge=1, description="read at most this many training rows"
    )
    max_test_rows: Whole | None = Field(None, ge=1, description="read at most this many test rows")
    missing: Literal["error", "drop"] = Field(
        "error",
        description="what to do about rows that lack a text, a label or their owner: `error` stops "
        "the run, `drop` leaves them out and counts them",
    )
    strip_labels: bool = Field(True, description="remove spaces around labels")
    classes: TextList | None = Field(
        None,
        description="for `partition.kind=sites`: names of the classes in their order (those of the "
        "test rows if not given)",
    )

    @field_validator("text")
    @classmethod
    def _one_or_two(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(value) not in (1, 2):
            raise ValueError("must name one text column, or two for text pairs")
        return value

    @model_validator(mode="after")
    def _prompt_with_completion(self) -> "SourceConfig":
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("source.prompt and source.completion must be given together")
        if self.prompt is not None and self.text is not None:
            raise ValueError("give source.text, or source.prompt with source.completion, not both")
        return self


class PartitionConfig(Table):
    """How the training rows are distributed over the clients."""

    kind: Kind = Field(
        DEFAULT_KIND,
        description="`iid`: at random; `dirichlet`: each class is distributed over the clients by "
        "Dir(alpha); `dirichlet_by_client`: each client draws its label distribution from "
        "Dir(alpha x class prior), with equal sizes; `pathological`: each client has a few "
        "classes; `natural`: a client for each owner, by a column; `sites`: each client brings "
        "rows of its own, and `data` has test rows only",
    )
    alpha: Real = Field(
        1.0, gt=0, description="Dirichlet concentration: a smaller value is more skewed"
    )
    classes_per_client: Whole = Field(2, ge=1, description="for `pathological`")
    key: str | None = Field(
        None, description="for `natural`: the column that identifies the client"
    )
    validation_fraction: Real = Field(
        0.1, gt=0, lt=1, description="share of a client's rows for validation"
    )
    test_fraction: Real = Field(0.1, gt=0, lt=1, description="share of a client's rows for testing")
    min_rows: Whole = Field(20, ge=3, description="fewest rows of a client")
    small: Literal["leave_out", "merge", "error"] = Field(
        "merge",
        description="what to do about a client with fewer than min_rows: `merge` moves rows of the "
        "largest client to it, `error` stops the run, `leave_out` (only for `natural`, and its "
        "default) leaves the owner out, so that no client has rows of two owners",
    )

    @model_validator(mode="before")
    @classmethod
    def _small_owners_are_left_out(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("kind") == "natural":
            return {"small": "leave_out", **value}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "PartitionConfig":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave no training rows")
        if self.kind == "natural" and self.key is None:
            raise ValueError("kind 'natural' needs the column name in partition.key")
        if self.kind != "natural" and self.small == "leave_out":
            raise ValueError(f"small=leave_out is only for kind=natural, not for kind={self.kind}")
        return self


class Config(Table):
    """A whole run."""

    method: str = Field(DEFAULT_METHOD, description="federated method")
    task: Literal["classification", "causal_lm"] = Field(
        DEFAULT_TASK,
        description="what is learnt: `classification` of texts, or `causal_lm`, to generate text; "
        "found from the model and the columns of the data if not given",
    )
    model: str = Field(
        "builtin",
        description="`builtin`, `mpnet` or `smollm2` (from Python packages), a Hub id, a folder, a "
        "GGUF file, or `config:ARCHITECTURE` (random weights)",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="quantization of the backbone's linear layers, by bitsandbytes "
        "(`pip install 'droppeft[quantization]'`); head and adapters stay fp32",
    )
    data: str = Field(
        "builtin", description="`builtin`, a Hub id, a folder, or a file; `$VARIABLES` are expanded"
    )
    transport: str = Field(
        "in_process",
        description="how instructions reach clients: `in_process`, or `flower` (Flower's "
        "simulation engine)",
    )
    sites: TextList = Field(
        (),
        description="node files of the clients, each with rows of its own, for a run on one "
        "machine; sets `partition.kind=sites`",
    )
    start_from: str | None = Field(
        None,
        description="the folder of a run, or of an adapter in PEFT's format, with whose values "
        "training begins (ours)",
    )
    seed: Whole = Field(0, ge=0, lt=2**63, description="seed of everything that is random")
    rounds: Whole = Field(10, ge=1, description="federated rounds")
    clients: Whole = Field(
        DEFAULT_CLIENTS,
        ge=0,
        description="number of clients; with `partition.kind=natural`, 0 (the default) is one for "
        "every owner (the run's config.toml has the number); with `sites`, their number",
    )
    cohort_size: Whole = Field(
        DEFAULT_COHORT_SIZE,
        ge=0,
        description="number of updates that a round merges at most; if not given, all clients "
        "where there are fewer",
    )
    quorum: Whole = Field(
        1, ge=1, description="fewest updates for a round to be merged; with fewer nothing changes"
    )
    workers: Whole = Field(
        0,
        ge=0,
        description="clients that train at a time on this machine, each in a process; 0: as many "
        "as cores, clients of a round and memory allow; no result depends on it",
    )
    threads: Whole = Field(
        1,
        ge=1,
        description="torch threads of each client; with another number, the last digits of a "
        "result are others",
    )
    accelerator: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="hardware for training and evaluation"
    )
    tracker: Literal["none", "tensorboard", "mlflow", "wandb", "trackio"] = Field(
        "none",
        description="experiment tracker that also gets each round, offline, in the run's folder; "
        "its package must be installed",
    )
    target: Real | None = Field(
        None,
        gt=0,
        description="report when the global model reaches this value of the task's first metric "
        "(accuracy; loss for `causal_lm`)",
    )
    source: SourceConfig = Field(default_factory=SourceConfig)
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig.model_validate({}))
    backward: BackwardConfig = Field(default_factory=BackwardConfig)
    dropout: DropoutConfig = Field(default_factory=lambda: DropoutConfig.model_validate({}))
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig.model_validate({}))
    ditto: DittoConfig = Field(default_factory=DittoConfig)
    frozen: FrozenConfig = Field(default_factory=lambda: FrozenConfig.model_validate({}))
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    configurator: ConfiguratorConfig = Field(default_factory=ConfiguratorConfig)
    sharing: SharingConfig = Field(default_factory=SharingConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    traffic: TrafficConfig = Field(default_factory=TrafficConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    clock: ClockConfig = Field(default_factory=ClockConfig)
    flower: FlowerConfig = Field(default_factory=FlowerConfig)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_task_and_method(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return with_defaults(value)

    @model_validator(mode="after")
    def _one_site_for_each_client(self) -> "Config":
        if self.sites and self.partition.kind != "sites":
            raise ValueError(
                f"sites have rows of their own, which partition.kind={self.partition.kind} does "
                "not distribute; leave one of the two out"
            )
        if self.sites and self.clients != len(self.sites):
            raise ValueError(
                f"clients={self.clients}, but sites names {len(self.sites)}; leave clients out"
            )
        if self.partition.kind == "sites" and not self.clients:
            raise ValueError(
                "partition.kind=sites needs the number of clients; name their node files with "
                "sites, or on a SuperLink set clients"
            )
        return self

    @model_validator(mode="after")
    def _clients_known(self) -> "Config":
        for key in ("clients", "cohort_size"):
            if getattr(self, key) == 0 and (self.partition.kind != "natural" or self.clients):
                raise ValueError(f"{key}=0 is too few; give 1 or more")
        return self

    @model_validator(mode="after")
    def _quorum_fits(self) -> "Config":
        if not self.cohort_size:
            return self
        if self.quorum > self.cohort_size:
            raise ValueError(
                f"quorum={self.quorum} is larger than cohort_size={self.cohort_size}; "
                "lower quorum or raise cohort_size"
            )
        return self

    @model_validator(mode="after")
    def _cohort_fits(self) -> "Config":
        if not self.clients:
            return self
        if self.cohort_size > self.clients:
            raise ValueError(
                f"cohort_size={self.cohort_size} is larger than clients={self.clients}; "
                "lower cohort_size or raise clients"
            )
        if self.drawn > self.clients:
            raise ValueError(
                f"clock.over_selection={self.clock.over_selection} draws {self.drawn} clients "
                f"for a cohort of {self.cohort_size}, but there are only {self.clients}; "
                "lower one of them"
            )
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the server measures what each layer is worth, on training rows set aside."""
        settings = self.configurator
        drops = settings.policy == "fixed" or any(settings.means)
        return self.dropout.shape == CALIBRATED and drops

    @property
    def drawn(self) -> int:
        """Clients drawn for a round: the cohort times the over-selection, rounded up."""
        # In binary floating point, 10 * 1.1 is slightly more than 11.
        return math.ceil(round(self.cohort_size * self.clock.over_selection, 6))
