"""Defaults that depend on the method, the task, the data and other settings. Ours."""

from collections.abc import Mapping
from typing import Any, Literal

from droppeft.config.exclusive import EXCLUSIVE
from droppeft.config.frozen import HALF

DEFAULT_METHOD = "adaptive"
DEFAULT_TASK: Literal["classification"] = "classification"
DEFAULT_CLIENTS = 20
DEFAULT_COHORT_SIZE = 5

# Defaults of a method that differ from the general ones, by table.
METHOD_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "adaptive": {
        # As many parameters in half of the layers as rank 8 has in all of them.
        "adapter": {"type": "lora", "rank": 16},
        "dropout": {"mean": 0.0, "protect_first": 0, "protect_last": 0},
        "frozen": {"layers": HALF, "cache": False},
        "configurator": {
            "policy": "budgeted_thompson",
            "means": (0.0,),
            "depths": ((1.0,), (0.66,)),
        },
        "traffic": {"encoding": "int8"},  # docs/benchmarks/precision.md
    },
    "fedadapter": {"adapter": {"type": "bottleneck"}},
    "fedprompt": {"adapter": {"type": "prompt_tuning"}},
    "fedptuning": {"adapter": {"type": "p_tuning"}},
    "fedprefix": {"adapter": {"type": "prefix_tuning"}},
    "fedia3": {"adapter": {"type": "ia3"}},
    # Their updates change frozen weights, by less than bf16 resolves.
    "flora": {"training": {"precision": "fp32"}},
    "fedex_lora": {"training": {"precision": "fp32"}},
    "fedbitfit": {"adapter": {"type": "beft", "targets": ("all-linear",)}},
}

# The same for a task: these win over the method's.
DEFAULTS_OF_METHOD_AND_TASK: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    # docs/benchmarks/layer-modes.md
    ("adaptive", "causal_lm"): {
        "adapter": {"type": "lora", "rank": 8},
        "frozen": {"layers": 0},
        "configurator": {
            "policy": "layer_values",
            "depths": ((1.0,), (1.0, 0.67, 0.33, 0.33), (0.5,), (0.33,)),
            "steps": (1.0, 0.5, 0.25),
        },
        # Half of the default batch, which halves the stored activations.
        "training": {"micro_batch_size": 4},
    },
}

# Defaults of a task that differ from the general ones, by table; they win over the method's.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "classification": {},
    "causal_lm": {
        "model": "smollm2",
        # docs/benchmarks/recipe.md
        "training": {
            "batch_size": 8,
            "learning_rate": 1e-3,
            "loraplus_lr_ratio": 16.0,
            "max_length": 256,
        },
        "partition": {"kind": "iid"},
        "evaluation": {"rows": 50, "final_rows": 200, "batch_size": 8},
    },
}

# Defaults of a task on the built-in data, by table; they win over the task's.
BUILTIN_DEFAULTS: dict[str, dict[str, Any]] = {
    # docs/benchmarks/default-run.md
    "classification": {"training": {"learning_rate": 3e-3}},
    "causal_lm": {"partition": {"kind": "natural", "key": "package"}, "clients": 20},
}

PRIVACY_KEYS = ("epsilon", "noise_multiplier")
"""Settings of the table ``privacy`` of which each turns it on."""

# Defaults with differential privacy, by table: clients do not measure models on their rows.
PRIVACY_DEFAULTS: dict[str, dict[str, Any]] = {
    "evaluation": {"validation_clients": 0, "personalised": False},
}


def with_defaults(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a run with the defaults that follow from those that are given.

    Args:
        value: settings that are given, as in a configuration file.
    """
    value = _with_kind_of_sites(value)
    for defaults in (
        _defaults_with_privacy(value),
        _defaults_of_the_task(value),
        DEFAULTS_OF_METHOD_AND_TASK.get(_method_and_task(value), {}),
        METHOD_DEFAULTS.get(_method_and_task(value)[0], {}),
    ):
        value = {
            **value,
            **{
                name: _completed(name, value.get(name, {}), of_table)
                if isinstance(of_table, Mapping)
                else value.get(name, of_table)
                for name, of_table in defaults.items()
            },
        }
    return _with_sizes(value)


def _completed(table: str, given: object, defaults: Mapping[str, Any]) -> object:
    """A table with a method's defaults, except those that exclude what is given."""
    if not isinstance(given, Mapping):
        return given
    if given.get("type", defaults.get("type")) != defaults.get("type"):
        return given  # the other defaults belong to the method's adapter type
    rivals = EXCLUSIVE.get(table, ())
    chosen = any(given.get(key) is not None for key in rivals)
    added = {key: item for key, item in defaults.items() if not (chosen and key in rivals)}
    return {**added, **given}


def _defaults_of_the_task(given: Mapping[str, Any]) -> dict[str, Any]:
    task = given.get("task", DEFAULT_TASK)
    defaults = TASK_DEFAULTS.get(str(task), {})
    if given.get("data", "builtin") != "builtin" or _kind_of(given) == "sites":
        return defaults
    return {**defaults, **BUILTIN_DEFAULTS.get(str(task), {})}


def _method_and_task(given: Mapping[str, Any]) -> tuple[str, str]:
    return str(given.get("method", DEFAULT_METHOD)), str(given.get("task", DEFAULT_TASK))


def _kind_of(value: Mapping[str, Any]) -> object:
    """The kind of the partition, if it is given."""
    partition = value.get("partition")
    return partition.get("kind") if isinstance(partition, Mapping) else None


def _with_kind_of_sites(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Set the kind of the partition that follows from a list of sites."""
    partition = value.get("partition", {})
    if not value.get("sites") or not isinstance(partition, Mapping):
        return value
    return {**value, "partition": {"kind": "sites", **partition}}


def _defaults_with_privacy(given: Mapping[str, Any]) -> Mapping[str, Any]:
    privacy = given.get("privacy")
    chosen = isinstance(privacy, Mapping) and any(privacy.get(key) for key in PRIVACY_KEYS)
    return PRIVACY_DEFAULTS if chosen else {}


def _with_sizes(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Set the number of clients and the cohort, or 0 until the owners are counted."""
    default = {"natural": 0, "sites": _number_of_sites(value.get("sites"))}
    clients = value.get("clients", default.get(str(_kind_of(value)), DEFAULT_CLIENTS))
    known = type(clients) is int and clients > 0
    cohort = min(DEFAULT_COHORT_SIZE, clients) if known else 0
    return {"cohort_size": cohort, **value, "clients": clients}


def _number_of_sites(sites: object) -> int:
    """The length of a list that may be written with commas."""
    if isinstance(sites, str):
        return len(sites.split(","))
    return len(sites) if isinstance(sites, list | tuple) else 0
