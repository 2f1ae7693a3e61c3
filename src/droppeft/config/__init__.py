"""The configuration of a run: its tables, and functions that read and write them."""

from droppeft.config.adapter import AdapterConfig
from droppeft.config.backward import BackwardConfig
from droppeft.config.clock import Bandwidth, ClockConfig, DeviceProfile
from droppeft.config.configurator import ConfiguratorConfig
from droppeft.config.dropout import DropoutConfig
from droppeft.config.evaluation import EvaluationConfig
from droppeft.config.flower import FlowerConfig
from droppeft.config.frozen import FrozenConfig
from droppeft.config.privacy import PrivacyConfig
from droppeft.config.reading import (
    as_tree,
    available_cores,
    build_config,
    check_keys,
    config_with_task,
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
from droppeft.config.schema import Config, PartitionConfig, SourceConfig
from droppeft.config.server import ServerConfig
from droppeft.config.sharing import SharingConfig
from droppeft.config.training import TrainingConfig

__all__ = [
    "AdapterConfig",
    "BackwardConfig",
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
    "PrivacyConfig",
    "ServerConfig",
    "SharingConfig",
    "SourceConfig",
    "TrainingConfig",
    "as_tree",
    "available_cores",
    "build_config",
    "check_keys",
    "config_with_task",
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
