"""The full names of the modules that peft adapts, and their ranks.

Ours, except for the default targets of an architecture, which are peft's.
"""

from collections.abc import Sequence
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from droppeft.adapters.settings import config_class
from droppeft.adapters.types import TYPES
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import AdapterSpec

_SAME_MODULES = {"xlm-roberta": "roberta"}


OWN_DEFAULTS = {"mpnet": ["q", "v"]}
"""Targets of architectures for which peft has no default: the same maps as those of BERT."""


def layer_fields(model: Any, name: str, spec: AdapterSpec, blocks_path: str) -> dict[str, Any]:
    """Return the fields of peft's configuration that depend on the layers.

    Args:
        model: the backbone.
        name: a layered type of peft.
        blocks_path: dotted name of the list of layers inside ``model``.

    Returns:
        The fields for the full names of the modules, and for their ranks.

    Raises:
        DroppeftError: if no layer has a module of a target's name, or peft has no default targets
            for the architecture.
    """
    targets = _target_names(model, name, spec, blocks_path)
    fields: dict[str, Any] = {"target_modules": targets}
    known = config_class(name).__dataclass_fields__
    if "fan_in_fan_out" in known:
        fields["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in model.modules())
    if "feedforward_modules" in known:
        inside = _of_type(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING, model) or []
        fields["feedforward_modules"] = [target for target in targets if _named(target, inside)]
    ranks = {
        target: layer.rank
        for target in targets
        if (layer := spec.layers[_layer_index(target, blocks_path)]) and layer.rank is not None
    }
    if ranks:
        default = fields[TYPES[name].settings["rank"]] = max(ranks.values())
        differing = {target: rank for target, rank in ranks.items() if rank != default}
        if differing:
            fields["rank_pattern"] = differing
    return fields


def _target_names(model: Any, name: str, spec: AdapterSpec, blocks_path: str) -> list[str]:
    """Return the full names of the modules that get an adapter, all of them inside layers."""
    on_norms = name == "ln_tuning"
    possible = {
        path: _layer_index(path, blocks_path)
        for path, module in model.named_modules()
        if path.startswith(f"{blocks_path}.") and _can_carry(module, on_norms)
    }
    wanted = _wanted(model, name, spec.targets, on_norms)
    chosen = {
        path: layer for path, layer in possible.items() if wanted is None or _named(path, wanted)
    }
    for target in wanted or ():
        if not any(_named(path, [target]) for path in chosen):
            known = sorted({path.rpartition(".")[2] for path in possible})
            raise DroppeftError(
                f"adapter.targets: no layer has a {'normalisation' if on_norms else 'linear'} "
                f"module {target!r}; choose from {', '.join(known)}"
            )
    return [path for path, layer in chosen.items() if spec.layers[layer] is not None]


def _can_carry(module: nn.Module, on_norms: bool) -> bool:
    # Architectures have different normalisation classes, but all class names contain "Norm".
    return "Norm" in type(module).__name__ if on_norms else isinstance(module, nn.Linear | Conv1D)


def _wanted(
    model: Any, name: str, targets: tuple[str, ...], on_norms: bool
) -> Sequence[str] | None:
    """Return names of modules, or ends of names; ``None`` for all that can have an adapter."""
    if targets == ("all-linear",) and on_norms:
        raise DroppeftError(
            "adapter.targets: ln_tuning does not adapt linear modules; leave the setting out"
        )
    if targets == ("all-linear",) or (targets == ("default",) and on_norms):
        return None
    if targets != ("default",):
        return targets
    defaults = (
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
        if name == "ia3"
        else PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name.upper())].target_module_mapping
    )
    lora_defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    found = (
        _of_type(defaults, model)
        or _of_type(lora_defaults, model)
        or OWN_DEFAULTS.get(model.config.model_type)
    )
    if found is None:
        raise DroppeftError(
            f"peft has no default targets for {model.config.model_type!r}; "
            "name the modules in adapter.targets"
        )
    return found


def _of_type(mapping: dict[str, list[str]], model: Any) -> list[str] | None:
    """Return peft's list for the architecture, or for another one with the same modules."""
    model_type = model.config.model_type
    return mapping.get(model_type) or mapping.get(_SAME_MODULES.get(model_type, ""))


def _named(path: str, ends: Sequence[str]) -> bool:
    """Whether a module's name is, or ends with, one of the names; this is peft's rule."""
    return any(path == end or path.endswith(f".{end}") for end in ends)


def _layer_index(name: str, blocks_path: str) -> int:
    return int(name.removeprefix(f"{blocks_path}.").partition(".")[0])
