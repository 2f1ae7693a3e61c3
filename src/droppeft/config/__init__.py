"""The configuration of a run: its tables, and how they are read and written."""

from droppeft.config.reading import (
    as_tree,
    available_cores,
    build_config,
    known_keys,
    load_config,
    parse_word,
    read_toml,
    resolve,
    to_toml,
)
from droppeft.config.tables import (
    AdapterConfig,
    Config,
    DropoutConfig,
    EvaluationConfig,
    FlowerConfig,
    PartitionConfig,
    SourceConfig,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "Config",
    "DropoutConfig",
    "EvaluationConfig",
    "FlowerConfig",
    "PartitionConfig",
    "SourceConfig",
    "TrainingConfig",
    "as_tree",
    "available_cores",
    "build_config",
    "known_keys",
    "load_config",
    "parse_word",
    "read_toml",
    "resolve",
    "to_toml",
]
