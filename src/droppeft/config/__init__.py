"""The configuration of a run: its tables, and functions that read and write them."""

from droppeft.config.clock import Bandwidth, ClockConfig, DeviceProfile
from droppeft.config.configurator import ConfiguratorConfig
from droppeft.config.reading import (
    as_tree,
    available_cores,
    build_config,
    first_error,
    flat,
    key_of,
    known_keys,
    load_config,
    parse_override,
    read_toml,
    resolve,
    resolve_clients,
    resolve_layers,
    to_toml,
)
from droppeft.config.schema import (
    AdapterConfig,
    Config,
    DropoutConfig,
    EvaluationConfig,
    FlowerConfig,
    FrozenConfig,
    PartitionConfig,
    SourceConfig,
    TrainingConfig,
)
from droppeft.config.server import ServerConfig
from droppeft.config.sharing import SharingConfig

__all__ = [
    "AdapterConfig",
    "Bandwidth",
    "ClockConfig",
    "Config",
    "ConfiguratorConfig",
    "DeviceProfile",
    "DropoutConfig",
    "EvaluationConfig",
    "FlowerConfig",
    "FrozenConfig",
    "PartitionConfig",
    "ServerConfig",
    "SharingConfig",
    "SourceConfig",
    "TrainingConfig",
    "as_tree",
    "available_cores",
    "build_config",
    "first_error",
    "flat",
    "key_of",
    "known_keys",
    "load_config",
    "parse_override",
    "read_toml",
    "resolve",
    "resolve_clients",
    "resolve_layers",
    "to_toml",
]
