"""Check the settings of an adapter, and the options of peft's configuration classes. Ours."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from droppeft.adapters.types import BOTTLENECK, TYPES, AdapterType, adapter_type
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import AdapterSpec, LayerAdapter, OptionValue

CLOSED = frozenset(
    {
        # The adapted and trained modules follow from the layers and adapter.targets.
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "rank_pattern",
        "bias",
        # These follow from the model or the task.
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "inference_mode",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
        "token_dim",
    }
)
"""Options that droppeft sets itself, or whose effect is not limited to single layers."""

# peft's HiRA has a rank_pattern too, but ignores it.
RANK_PER_LAYER = (BOTTLENECK, "lora", "loha", "lokr", "delora")
"""Types whose rank (or width) may differ by layer."""

MOST_OPTION = 65_536
"""Largest absolute value of an option that a site takes from a server."""

WORDS = {
    "act_fn": ("relu", "gelu", "silu", "tanh", "sigmoid"),
    "wavelet_family": ("db1", "sym2", "coif1"),
    "encoder_reparameterization_type": ("MLP", "LSTM"),
}
"""Words that options may have where peft's configuration class does not list them."""

NEEDED = ("width", "tokens")
"""Settings for which peft has no default."""


def check(spec: AdapterSpec) -> str:
    """Check a specification and return its type.

    Raises:
        DroppeftError: if the specification does not have exactly one type, the type is unknown or
            refused, it does not have a setting or an option, or a value is impossible.
    """
    layers = [layer for layer in spec.layers if layer is not None]
    names = {layer.type for layer in layers}
    if not names:
        raise DroppeftError("no layer has an adapter; at least one must have one")
    if len(names) > 1:
        some = ", ".join(sorted(names))
        raise DroppeftError(f"an adapter must have the same type in all layers, not {some}")
    name = names.pop()
    kind = adapter_type(name)
    _check_settings(name, kind, spec, layers)
    if kind.kind != "layered" and len(set(spec.layers)) > 1:
        raise DroppeftError(f"adapter.type={name} must be the same in every layer")
    checked_options(name, spec.options)
    return name


def checked_options(name: str, options: tuple[tuple[str, OptionValue], ...]) -> dict[str, Any]:
    """Return the options with values as peft's configuration class of a type expects them.

    Raises:
        DroppeftError: if the class does not have an option, it may not be set, or its value has the
            wrong type.
    """
    kinds = open_options(name) if options else {}
    return {option: _checked(name, kinds, option, value) for option, value in options}


def check_options_of_server(name: str, options: tuple[tuple[str, OptionValue], ...]) -> None:
    """Check that options from a server are numbers of a usual size, or one of a few fixed words.

    Other texts could name files, modules or models on the machine of a site.

    Raises:
        DroppeftError: an option is anything else.
    """
    adapter_type(name)  # refuses an unknown one
    kinds = open_options(name)
    for option, value in options:
        if isinstance(value, bool):
            continue
        words = {*_words(kinds.get(option)), *WORDS.get(option, ())}
        fits = (
            value in words
            if isinstance(value, str)
            else isinstance(value, int | float) and abs(value) <= MOST_OPTION
        )
        seed = isinstance(value, int) and option.endswith(("seed", "_key"))
        if not (fits or seed):
            raise DroppeftError(f"adapter.options.{option}={value!r} is not taken from a server")


def _words(kind: Any) -> Iterator[str]:
    """The words that an annotation lists."""
    for one in typing.get_args(kind):
        yield from [one] if isinstance(one, str) else _words(one)


def open_options(name: str) -> dict[str, Any]:
    """Return the type of each option that may be set, by name."""
    if name == BOTTLENECK:
        return {}
    closed = CLOSED | TYPES[name].closed | set(TYPES[name].settings.values())
    kinds = typing.get_type_hints(config_class(name))
    names = [entry.name for entry in dataclasses.fields(config_class(name))]
    return {option: kinds[option] for option in names if option not in closed}


def config_class(name: str) -> Any:
    """Return peft's configuration class of a type."""
    from peft import PeftType  # takes seconds
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]


def _check_settings(
    name: str, kind: AdapterType, spec: AdapterSpec, layers: list[LayerAdapter]
) -> None:
    targets_allowed = kind.kind == "layered" or spec.targets == ("default",)
    given: dict[str, list[Any]] = {
        "rank": [layer.rank for layer in layers],
        "width": [layer.width for layer in layers],
        "alpha": [spec.alpha],
        "dropout": [spec.dropout],
        "tokens": [spec.tokens],
        "targets": [None if targets_allowed else spec.targets],
    }
    for setting, values in given.items():
        if setting not in kind.settings and values != [None] * len(values):
            raise DroppeftError(f"adapter.{setting}: type {name} has no such setting; leave it out")
        if setting in kind.settings:
            _check_values(name, setting, values)


def _check_values(name: str, setting: str, values: list[Any]) -> None:
    if None in values and (setting in NEEDED or set(values) != {None}):
        raise DroppeftError(
            f"adapter.type={name} needs adapter.{setting} in every layer that has an adapter"
        )
    if setting in ("rank", *NEEDED) and any(value is not None and value < 1 for value in values):
        raise DroppeftError(f"adapter.{setting} must be 1 or more")
    if len(set(values)) > 1 and name not in RANK_PER_LAYER:
        raise DroppeftError(f"adapter.type={name} must have the same rank in all layers")


def _checked(name: str, kinds: Mapping[str, Any], option: str, value: OptionValue) -> Any:
    place = f"adapter.options.{option}"
    settings = {field: setting for setting, field in TYPES[name].settings.items()}
    if option in settings:
        raise DroppeftError(f"{place}: set adapter.{settings[option]} instead")
    if option in CLOSED | TYPES[name].closed:
        raise DroppeftError(
            f"{place} cannot be set: droppeft sets it, or it affects more than single layers"
        )
    if option not in kinds:
        known = f"it has {', '.join(sorted(kinds))}" if kinds else "it has none"
        raise DroppeftError(f"{place}: type {name} has no such option; {known}")
    try:
        return TypeAdapter(kinds[option]).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise DroppeftError(f"{place}: {message[:1].lower()}{message[1:]}, got {value!r}") from None
