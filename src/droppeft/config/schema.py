"""The tables of a configuration: frozen, validated, every default written here and nowhere else."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from droppeft.config.clock import ClockConfig
from droppeft.config.configurator import ConfiguratorConfig
from droppeft.config.server import ServerConfig
from droppeft.config.sharing import SharingConfig
from droppeft.config.table import Real, Table, Whole, WordList

DEFAULT_MEAN_RATE = 1 / 3
DEFAULT_LOCAL_STEPS = 10

# Of every other type the defaults are those of peft's configuration class.
ADAPTER_DEFAULTS: dict[str, dict[str, int | float]] = {
    "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0},
    "bottleneck": {"width": 64},
    "prefix_tuning": {"tokens": 20},
    "prompt_tuning": {"tokens": 20},
    "p_tuning": {"tokens": 20},
}


HALF = "half"

# Settings of a method, by table, where the configuration gives none.
METHOD_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "adaptive": {
        "dropout": {"mean": 0.0, "protect_first": 0, "protect_last": 0},
        "frozen": {"layers": HALF, "cache": False},
        "configurator": {
            "policy": "budgeted_thompson",
            "means": (0.0,),
            "prefixes": (0.0, 0.34),
        },
    },
    "fedadapter": {"adapter": {"type": "bottleneck"}},
    "fedadaopt": {"adapter": {"type": "bottleneck"}},
    "fedprompt": {"adapter": {"type": "prompt_tuning"}},
    "fedptuning": {"adapter": {"type": "p_tuning"}},
    "fedprefix": {"adapter": {"type": "prefix_tuning"}},
    "fedia3": {"adapter": {"type": "ia3"}},
    "fedbitfit": {"adapter": {"type": "beft", "targets": ("all-linear",)}},
}


# Settings of which only one may be given; the first has the default. A word on the command line
# replaces the file's choice.
RIVALS = {
    "dropout": ("mean", "count", "rates"),
    "training": ("local_steps", "local_epochs"),
}


def _with_default(table: object, rivals: Sequence[str], default: object) -> object:
    """Fill the first of the rival settings where none of them is given."""
    if not isinstance(table, Mapping) or any(table.get(key) is not None for key in rivals):
        return table
    return {**table, rivals[0]: default}


def _completed(table: str, given: object, defaults: Mapping[str, Any]) -> object:
    """A table with a method's defaults, less those that stand against what is given."""
    if not isinstance(given, Mapping):
        return given
    if given.get("type", defaults.get("type")) != defaults.get("type"):
        return given  # the others are of the method's own adapter
    rivals = RIVALS.get(table, ())
    chosen = any(given.get(key) is not None for key in rivals)
    kept = {key: item for key, item in defaults.items() if not (chosen and key in rivals)}
    return {**kept, **given}


def _steps_or_round(value: object) -> object:
    if value == "round" or (type(value) is int and value >= 1):
        return value
    raise ValueError("must be a number of steps, 1 or more, or round")


def _layers_or_half(value: object) -> object:
    if value == HALF or (type(value) is int and value >= 0):
        return value
    raise ValueError("must be a number of layers, 0 or more, or half")


class SourceConfig(Table):
    """Which columns and which parts of the data are read."""

    text: WordList | None = Field(
        None, description="text column, or two columns for a pair (found by name if not given)"
    )
    label: str | None = Field(None, description="label column (found by name if not given)")
    train: str | None = Field(None, description="name of the training split (found if not given)")
    test: str | None = Field(None, description="name of the test split (found if not given)")
    max_train_rows: Whole | None = Field(None, ge=1, description="read only so many training rows")
    max_test_rows: Whole | None = Field(None, ge=1, description="read only so many test rows")

    @field_validator("text")
    @classmethod
    def _one_or_two(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(value) not in (1, 2):
            raise ValueError("names one text column, or two for a pair")
        return value


class PartitionConfig(Table):
    """How the training rows are spread over the clients."""

    kind: Literal["iid", "dirichlet", "dirichlet_by_client", "pathological", "natural"] = Field(
        "dirichlet",
        description="`dirichlet`: each class is spread over the clients by Dir(alpha); "
        "`dirichlet_by_client`: each client draws its label mix from Dir(alpha x class prior), "
        "equal sizes; `pathological`: a few classes each; `natural`: by a column",
    )
    alpha: Real = Field(1.0, gt=0, description="Dirichlet concentration: small is more skewed")
    classes_per_client: Whole = Field(2, ge=1, description="for `pathological`")
    key: str | None = Field(None, description="for `natural`: the column that names the owner")
    validation_fraction: Real = Field(0.1, gt=0, lt=1, description="of a client's rows")
    test_fraction: Real = Field(0.1, gt=0, lt=1, description="of a client's rows")
    min_rows: Whole = Field(20, ge=3, description="fewest rows that make a client")
    small: Literal["error", "merge"] = Field(
        "merge",
        description="a client with fewer than min_rows: `merge` tops it up from the largest "
        "client, `error` stops",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "PartitionConfig":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave no training rows")
        if self.kind == "natural" and self.key is None:
            raise ValueError("kind 'natural' needs the column name in partition.key")
        return self


class AdapterConfig(Table):
    """What is trained beside the frozen model; a setting that the type does not have is refused."""

    type: str = Field("lora", description="PEFT type; [adapters.md](adapters.md) lists them")
    rank: Whole | None = Field(None, ge=1, description="rank r, of types that have one")
    alpha: Real | None = Field(
        None, gt=0, description="scaling numerator, of types that have one: updates count alpha/r"
    )
    dropout: Real | None = Field(None, ge=0, lt=1, description="dropout on the adapter's input")
    width: Whole | None = Field(None, ge=1, description="of a `bottleneck` (64 if not given)")
    tokens: Whole | None = Field(
        None, ge=1, description="virtual tokens of a prefix or prompt (20 if not given)"
    )
    targets: WordList = Field(
        ("default",),
        description="module names that get an adapter, `default` (peft's choice for type and "
        "architecture) or `all-linear`; of a `bottleneck`: `attention`, `feed_forward`",
    )
    options: dict[str, bool | int | float | str | tuple[str, ...]] = Field(
        {}, description="further settings of the type, by the names of peft's configuration class"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_type(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        defaults = ADAPTER_DEFAULTS.get(str(value.get("type", "lora")), {})
        return {**defaults, **{key: item for key, item in value.items() if item is not None}}

    @field_validator("options", mode="before")
    @classmethod
    def _plain_values(cls, value: Any) -> Any:
        for name, item in value.items() if isinstance(value, Mapping) else ():
            texts = isinstance(item, list | tuple) and all(isinstance(word, str) for word in item)
            if not texts and not isinstance(item, bool | int | float | str):
                raise ValueError(f"{name} must be a number, true or false, a text or some texts")
        return value


class DropoutConfig(Table):
    """Stochastic transformer layer dropout; used by the methods that drop layers."""

    mean: Real | None = Field(
        None, ge=0, le=1, description="mean rate over all layers (a third if nothing is given)"
    )
    count: Whole | None = Field(
        None, ge=0, description="instead of mean: how many layers a step drops on average"
    )
    rates: tuple[float, ...] | None = Field(
        None, description="instead of mean and shape: the rate of every layer"
    )
    shape: Literal["uniform", "incremental", "decay", "normal"] = Field(
        "uniform", description="how rates vary with depth at equal mean"
    )
    sampling: Literal["exact", "bernoulli"] = Field(
        "exact", description="`exact`: the same number of layers every step; `bernoulli`: coins"
    )
    every: Annotated[int | Literal["round"], BeforeValidator(_steps_or_round)] = Field(
        1,
        description="optimizer steps for which a draw holds, 1 or more; `round`: a client's whole "
        "turn",
    )
    schedule: Literal["constant", "warm_up", "recovery"] = Field(
        "constant",
        description="course of the rates over the run: `warm_up` grows from 0 in its first part, "
        "`recovery` ends with a part at full depth",
    )
    schedule_part: Real = Field(
        0.3, gt=0, le=1, description="part of the rounds that warm_up or recovery takes"
    )
    protect_first: Whole = Field(1, ge=0, description="first layers that are never dropped")
    protect_last: Whole = Field(1, ge=0, description="last layers that are never dropped")

    @field_validator("rates")
    @classmethod
    def _probabilities(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not all(0 <= rate <= 1 for rate in value):
            raise ValueError("every rate must lie between 0 and 1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _a_third_unless_said(cls, value: Any) -> Any:
        return _with_default(value, RIVALS["dropout"], DEFAULT_MEAN_RATE)

    @model_validator(mode="after")
    def _one_of_three(self) -> "DropoutConfig":
        if sum(value is not None for value in (self.mean, self.count, self.rates)) > 1:
            raise ValueError("give only one of dropout.mean, dropout.count and dropout.rates")
        return self


class FrozenConfig(Table):
    """First layers in which nothing is trained and that are never dropped."""

    layers: Annotated[int | Literal["half"], BeforeValidator(_layers_or_half)] = Field(
        0,
        description="how many, or `half` of the model's, rounded down; they get no adapter, and "
        "their dropout modules are off. dropout.mean, dropout.count and the protected ends are of "
        "the layers behind them",
    )
    cache: bool = Field(
        True,
        description="keep what they make of an example on the client's disk, so that they run once "
        "per example; otherwise they run in every step, without a backward",
    )
    precision: Literal["fp16", "bf16", "fp32"] = Field(
        "fp16", description="of what is kept; it is the same on an example's first visit"
    )
    limit_mb: Real = Field(
        2048.0, gt=0, description="disk that a client spends; beyond it the oldest goes"
    )

    @property
    def count(self) -> int:
        """How many layers are frozen; ``half`` has to be resolved before."""
        if isinstance(self.layers, int):
            return self.layers
        raise ValueError(f"frozen.layers={self.layers} before the model's layers are known")


class DittoConfig(Table):
    """Of `ditto`: every client also trains a whole adapter of its own, which it keeps."""

    pull: Real = Field(
        0.1, ge=0, description="weight of (pull/2)·‖own − received‖² in the own adapter's loss"
    )


class TrainingConfig(Table):
    """What a client does in its turn."""

    local_steps: Whole | None = Field(
        None, ge=1, description="optimizer steps per turn (10 if neither is given)"
    )
    local_epochs: Whole | None = Field(
        None, ge=1, description="instead of local_steps: passes over the client's rows"
    )
    batch_size: Whole = Field(16, ge=1, description="rows per optimizer step")
    learning_rate: Real = Field(
        1e-3, gt=0, description="AdamW's peak learning rate for the adapters"
    )
    head_learning_rate: Real = Field(
        1e-2, gt=0, description="the same for the head's last linear map, which starts from nothing"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="course of both learning rates over the whole run"
    )
    warmup_fraction: Real = Field(0.05, ge=0, lt=1, description="part of the run that warms up")
    weight_decay: Real = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    clip_norm: Real = Field(1.0, gt=0, description="largest global gradient norm")
    proximal: Real = Field(
        0.0,
        ge=0,
        description="FedProx: weight mu of (mu/2)·‖trained − received‖² in a client's loss",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="`bf16` and `fp16` run the forward under autocast, `fp16` with a scaled loss; "
        "adapters stay fp32",
    )
    checkpointing: bool = Field(
        False,
        description="keep only the inputs of the layers that run, and compute the rest again in "
        "the backward: less memory, a second forward, the same adapter",
    )
    offload: bool = Field(
        False,
        description="keep weights of layers that a turn does not run in a memory-mapped file, off "
        "the accelerator; for frozen.layers with their cache, or dropout.every=round",
    )
    max_length: Whole = Field(128, ge=4, description="tokens after which a text is cut")

    @model_validator(mode="before")
    @classmethod
    def _steps_unless_said(cls, value: Any) -> Any:
        return _with_default(value, RIVALS["training"], DEFAULT_LOCAL_STEPS)

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "TrainingConfig":
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("give only one of training.local_steps and training.local_epochs")
        return self


class EvaluationConfig(Table):
    """When and on how much test data the global model is measured."""

    every: Whole = Field(1, ge=1, description="rounds between evaluations")
    rows: Whole = Field(
        1000, ge=1, description="test rows of a round's evaluation, the same ones every time"
    )
    batch_size: Whole = Field(64, ge=1, description="rows per forward")
    personalised: bool = Field(
        True,
        description="when the run ends, measure every client's own model on its own test rows, "
        "whether it ever trained or not",
    )
    newcomers: bool = Field(
        False,
        description="then also give each client that never trained one epoch of its own rows, and "
        "measure what it makes of its model",
    )

    @model_validator(mode="after")
    def _newcomers_are_clients(self) -> "EvaluationConfig":
        if self.newcomers and not self.personalised:
            raise ValueError("newcomers are not measured with personalised=false; leave one out")
        return self


class FlowerConfig(Table):
    """Flower's part, in its simulation and on a SuperLink."""

    deadline_s: Real = Field(
        3600.0, gt=0, description="seconds after which a round closes without the missing replies"
    )
    nodes_timeout_s: Real = Field(
        120.0, gt=0, description="seconds that the start of a run waits for its clients' nodes"
    )
    model_server: bool = Field(
        True,
        description="on a SuperNode: keep the model in a process of its own between messages",
    )


class Config(Table):
    """A whole run."""

    method: str = Field("droppeft", description="federated method")
    model: str = Field(
        "builtin",
        description="`builtin`, a hub id, a folder, or `config:ARCHITECTURE` (random weights)",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="bits of the frozen model's linear maps, by bitsandbytes "
        "(`pip install 'droppeft[quantization]'`); heads, adapters and embeddings stay fp32",
    )
    data: str = Field(
        "builtin", description="`builtin`, a hub id, a folder, or a file; `$VARIABLES` are expanded"
    )
    transport: str = Field(
        "in_process",
        description="how instructions reach clients: `in_process`, or `flower` (its simulation "
        "engine)",
    )
    seed: Whole = Field(0, ge=0, lt=2**63, description="everything random follows from it")
    rounds: Whole = Field(15, ge=1, description="federated rounds")
    clients: Whole = Field(20, ge=1, description="clients that hold data")
    cohort_size: Whole = Field(5, ge=1, description="clients that train in a round")
    quorum: Whole = Field(
        1, ge=1, description="fewest replies that a round merges; with fewer it merges nothing"
    )
    threads: Whole = Field(
        0,
        ge=0,
        description="torch threads; 0: all cores (the run's config.toml says how many)",
    )
    accelerator: Literal["auto", "cpu", "cuda"] = Field("auto", description="where tensors live")
    tracker: Literal["none", "tensorboard", "mlflow", "wandb", "trackio"] = Field(
        "none",
        description="where rounds are written besides the ledger, offline, in the run's folder; "
        "its package has to be installed",
    )
    target_accuracy: Real | None = Field(
        None, gt=0, lt=1, description="report when this global accuracy was reached"
    )
    source: SourceConfig = Field(default_factory=SourceConfig)
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig.model_validate({}))
    dropout: DropoutConfig = Field(default_factory=lambda: DropoutConfig.model_validate({}))
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig.model_validate({}))
    ditto: DittoConfig = Field(default_factory=DittoConfig)
    frozen: FrozenConfig = Field(default_factory=lambda: FrozenConfig.model_validate({}))
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    configurator: ConfiguratorConfig = Field(default_factory=ConfiguratorConfig)
    sharing: SharingConfig = Field(default_factory=SharingConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    clock: ClockConfig = Field(default_factory=ClockConfig)
    flower: FlowerConfig = Field(default_factory=FlowerConfig)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        defaults = METHOD_DEFAULTS.get(str(value.get("method")), {})
        return {
            **value,
            **{name: _completed(name, value.get(name, {}), own) for name, own in defaults.items()},
        }

    @model_validator(mode="after")
    def _quorum_fits(self) -> "Config":
        if self.quorum > self.cohort_size:
            raise ValueError(
                f"quorum={self.quorum} is larger than cohort_size={self.cohort_size}; "
                "lower quorum or raise cohort"
            )
        return self

    @model_validator(mode="after")
    def _cohort_fits(self) -> "Config":
        if self.cohort_size > self.clients:
            raise ValueError(
                f"cohort_size={self.cohort_size} is larger than clients={self.clients}; "
                "lower cohort or raise clients"
            )
        if self.drawn > self.clients:
            raise ValueError(
                f"clock.over_selection={self.clock.over_selection} draws {self.drawn} clients "
                f"for a cohort of {self.cohort_size}, there are {self.clients}; lower one of them"
            )
        return self

    @property
    def drawn(self) -> int:
        """Clients drawn for a round: the cohort times the over-selection, rounded up."""
        # 10 x 1.1 is 11 and a little more in binary.
        return math.ceil(round(self.cohort_size * self.clock.over_selection, 6))
