"""Attach trainable modules to a frozen backbone, and take them off again.

Source: LoRA (arXiv:2106.09685) as implemented by peft; per-layer ranks are ours.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from droppeft.errors import DroppeftError
from droppeft.plans import AdapterSpec

LINEAR = (nn.Linear, Conv1D)


def attach(
    model: nn.Module,
    spec: AdapterSpec,
    blocks_path: str,
    seed: int,
    new_modules: Sequence[str] = (),
) -> nn.Module:
    """Wrap ``model`` so that only the adapters named by ``spec`` and the task head are trainable.

    Args:
        model: a transformers model for sequence classification; its modules are replaced in
            place, :func:`detach` undoes that.
        spec: one entry per layer of ``blocks_path``.
        blocks_path: dotted name of the list of layers inside ``model``.
        seed: for the adapters' initial values. The process-wide generator is left as it was.
        new_modules: modules to train whole, besides the classifier: a pooler without pretrained
            values would otherwise stay random.

    Raises:
        DroppeftError: a target names no linear module of a layer.
    """
    config = _lora_config(model, spec, blocks_path, new_modules)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks transformers for an attribute that has been renamed: no user can mend that.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        torch.manual_seed(seed)
        wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


def detach(model: Any) -> nn.Module:
    """Return the backbone of what :func:`attach` returned, with its old values, frozen.

    peft would leave the trained head in it.
    """
    heads = {
        name: module.original_module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    backbone: nn.Module = model.unload()
    for name, head in heads.items():
        backbone.set_submodule(name, head)
    return backbone


def export_adapter(model: Any, folder: Path, card: str) -> None:
    """Write the adapter in PEFT's format; the same tensors give the same bytes.

    peft keeps module names in sets, whose order changes from process to process, and writes a
    card of its own: both are replaced.
    """
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(_sorted_lists(content), indent=2, sort_keys=True) + "\n", "utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _lora_config(
    model: nn.Module, spec: AdapterSpec, blocks_path: str, new_modules: Sequence[str]
) -> LoraConfig:
    ranks = {index: layer.rank for index, layer in enumerate(spec.layers) if layer is not None}
    usual = max(ranks.values(), default=1)
    names = _target_names(model, spec, blocks_path, ranks)
    types = {layer.type for layer in spec.layers if layer is not None}
    if types != {"lora"} or min(ranks.values()) < 1:
        raise DroppeftError("an adapter needs a layer to sit in, type lora and rank 1 or more")
    return LoraConfig(
        task_type="SEQ_CLS",
        r=usual,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=names,
        # peft adds "classifier" and "score" by itself for this task.
        modules_to_save=sorted(set(new_modules) - {"classifier", "score"}) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        rank_pattern={
            name: ranks[_layer_index(name, blocks_path)]
            for name in names
            if ranks[_layer_index(name, blocks_path)] != usual
        },
    )


def _target_names(
    model: nn.Module, spec: AdapterSpec, blocks_path: str, ranks: dict[int, int]
) -> list[str]:
    """Full names of the modules that get an adapter: never outside a layer, never by guess."""
    wanted = _wanted(model, spec.targets)
    linear = {
        name: _layer_index(name, blocks_path)
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and name.startswith(f"{blocks_path}.")
    }
    names = [
        name
        for name, layer in linear.items()
        if layer in ranks and (wanted is None or name.rpartition(".")[2] in wanted)
    ]
    found = {name.rpartition(".")[2] for name in names}
    for target in wanted or ():
        if ranks and target not in found:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise DroppeftError(
                f"adapter.targets: no layer has a linear module {target!r}; "
                f"this model has {', '.join(known)}"
            )
    return names


def _wanted(model: nn.Module, targets: tuple[str, ...]) -> tuple[str, ...] | None:
    if targets == ("all-linear",):
        return None
    if targets != ("default",):
        return targets
    model_type = model.config.model_type  # type: ignore[union-attr]
    if model_type not in DEFAULT_TARGETS:
        raise DroppeftError(
            f"peft has no default targets for {model_type!r}; name them in adapter.targets"
        )
    return tuple(DEFAULT_TARGETS[model_type])


def _layer_index(name: str, blocks_path: str) -> int:
    return int(name.removeprefix(f"{blocks_path}.").partition(".")[0])


def _sorted_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted_lists(item) for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value
