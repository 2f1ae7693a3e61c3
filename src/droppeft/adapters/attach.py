"""Attach adapters to a frozen backbone, detach, export and merge them.

Source: peft's implementations of the types in :mod:`droppeft.adapters.types`. Ranks per layer and
bottlenecks are ours.
"""

import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from droppeft.adapters.bottleneck import (
    attach_bottlenecks,
    places_of,
    remove_bottlenecks,
    save_bottlenecks,
)
from droppeft.adapters.by_layer import trainable_by_layer
from droppeft.adapters.prefix import PREFIX_MODELS
from droppeft.adapters.settings import check, checked_options, config_class
from droppeft.adapters.targets import layer_fields
from droppeft.adapters.types import BOTTLENECK, TYPES, check_on
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks
from droppeft.messages.instruction import AdapterSpec
from droppeft.messages.tensors import OTHER, LayerKey
from droppeft.models.quantization import quantization_of

HEADS = ("classifier", "score")
"""Names of task heads in transformers; peft trains modules with these names by default."""

SEQUENCE_CLASSIFICATION, CAUSAL_LM = "SEQ_CLS", "CAUSAL_LM"
"""peft's names of the tasks for which an adapter can be attached."""

_PEFT_ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Loading:
    """How an exported adapter is loaded into a plain model.

    Attributes:
        library: the library that defines the format.
        module: the module to import ``function`` from.
        function: name of the function to call with the model and the folder.
    """

    library: str
    module: str
    function: str

    @property
    def import_line(self) -> str:
        """The import statement for ``function``."""
        return f"from {self.module} import {self.function.partition('.')[0]}"


def loading_of(name: str) -> Loading:
    """Return how an exported adapter of a type is loaded."""
    if name == BOTTLENECK:
        return Loading("droppeft", "droppeft.adapters.bottleneck", "load_bottleneck")
    return Loading("peft", "peft", "PeftModel.from_pretrained")


def attach(
    model: nn.Module,
    spec: AdapterSpec,
    blocks_path: str,
    seed: int,
    new_modules: Sequence[str] = (),
    task_type: str = SEQUENCE_CLASSIFICATION,
) -> nn.Module:
    """Wrap ``model`` so that only the adapters that ``spec`` describes and the head are trainable.

    What is trained is in fp32, in whichever type frozen weights are held.

    The head of a causal language model is not trained.

    Args:
        model: a transformers model for the task. Its modules are replaced in place;
            :func:`detach` restores them.
        spec: the adapter, with one entry per layer of ``blocks_path``.
        blocks_path: dotted name of the list of layers inside ``model``.
        seed: seed of the initial values. torch's global random state does not change.
        new_modules: names of modules to train in full besides the head, such as a pooler that has
            no pretrained values.
        task_type: :data:`SEQUENCE_CLASSIFICATION` or :data:`CAUSAL_LM`.

    Raises:
        DroppeftError: if the specification does not fit its type, the model or its quantisation.
            The modules of the model are restored in that case.
    """
    name = check(spec)
    check_on(name, [option for option, _ in spec.options], quantization_of(model))
    try:
        with torch.random.fork_rng(), _quiet():
            torch.manual_seed(seed)
            wrapped = _wrapped(model, name, spec, blocks_path, new_modules, task_type)
            _check_addresses(wrapped, name, spec)
            for value in wrapped.parameters():
                if value.requires_grad:  # copies of frozen weights have their data type
                    value.data = value.data.float()
    except DroppeftError:
        _strip(model)
        raise
    except _PEFT_ERRORS as error:
        _strip(model)
        reason = str(error).strip().partition("\n")[0]
        raise DroppeftError(f"adapter.type={name} does not fit this model: {reason}") from None
    return wrapped


def detach(model: Any) -> nn.Module:
    """Return the frozen backbone of a model from :func:`attach`, with its original values."""
    backbone: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    _strip(backbone)
    return backbone


def export_adapter(model: Any, folder: Path, card: str) -> None:
    """Write an adapter to a folder, in the format that :func:`loading_of` describes.

    The same tensors give the same bytes. Lists of names in peft's configuration are sorted for
    this, since peft stores them as sets, whose order differs between processes. peft's model card
    is replaced by ``card``.
    """
    if isinstance(model, PeftModel):
        with torch.no_grad():  # P-tuning runs its encoder, which must be in evaluation mode
            model.eval().save_pretrained(folder)
        path = folder / "adapter_config.json"
        content = _sorted_lists(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        save_bottlenecks(model, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def merged(model: Any) -> nn.Module:
    """Merge the adapter and the trained head into the backbone and return it.

    Args:
        model: a model from :func:`attach`. It cannot be used afterwards.

    Raises:
        DroppeftError: if an adapter of this type cannot be merged into weights.
    """
    is_peft = isinstance(model, PeftModel)
    kind = str(model.active_peft_config.peft_type.value).lower() if is_peft else BOTTLENECK
    # Prompts have no merge_and_unload: peft passes the look-up on to the backbone, without success.
    merge = getattr(model, "merge_and_unload", None)
    try:
        if merge is None:
            raise NotImplementedError("it is not a change of the backbone's weights")
        plain: nn.Module = merge(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise DroppeftError(
            f"an adapter of type {kind} cannot be merged into the backbone ({error}); "
            "export it without --merge"
        ) from None
    for name, module in list(plain.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # some types leave the head wrapped
            plain.set_submodule(name, module.modules_to_save["default"])
    return plain


def _wrapped(
    model: Any,
    name: str,
    spec: AdapterSpec,
    blocks_path: str,
    new_modules: Sequence[str],
    task_type: str,
) -> nn.Module:
    if name == BOTTLENECK:
        widths = [None if layer is None else layer.width for layer in spec.layers]
        heads = new_modules if task_type == CAUSAL_LM else (*HEADS, *new_modules)
        return attach_bottlenecks(model, widths, places_of(model, spec.targets), heads)
    kind = TYPES[name]
    given = {"alpha": spec.alpha, "dropout": spec.dropout, "tokens": spec.tokens}
    fields = {
        "task_type": task_type,
        # peft adds its own names for this task.
        "modules_to_save": sorted(set(new_modules) - set(HEADS)) or None,
        **{kind.settings[key]: value for key, value in given.items() if value is not None},
        **checked_options(name, spec.options),
    }
    if kind.kind == "layered":
        fields |= layer_fields(model, name, spec, blocks_path)
    else:
        _check_prompt(model, name)
    config = config_class(name)(**fields)
    wrap: Any = PREFIX_MODELS[task_type] if kind.kind == "sliced" else get_peft_model
    wrapped: nn.Module = wrap(model, config)
    return wrapped


def _check_prompt(model: Any, name: str) -> None:
    """Refuse architectures on which peft's prompts do not work reliably."""
    if TYPES[name].kind == "global" and hasattr(model, "score"):
        raise DroppeftError(
            f"adapter.type={name}: transformers classifies with a {model.config.model_type} by the "
            "last text token, which it cannot find after a prompt; use prefix_tuning"
        )
    takes = inspect.signature(model.base_model.forward).parameters
    if TYPES[name].kind == "sliced" and "past_key_values" not in takes:
        raise DroppeftError(
            f"adapter.type={name}: a prefix consists of cached keys and values, which a "
            f"{model.config.model_type} does not accept; use another type"
        )


def _check_addresses(wrapped: nn.Module, name: str, spec: AdapterSpec) -> None:
    """Check that the trainable tensors are in the layers of ``spec`` and nowhere else."""
    found = set(trainable_by_layer(wrapped, find_blocks(wrapped)[0]))
    layers: set[LayerKey] = {index for index, layer in enumerate(spec.layers) if layer is not None}
    if TYPES[name].kind == "global":
        layers = {OTHER}
    for key in layers - found:
        raise DroppeftError(
            f"adapter.type={name} has no trainable tensor in layer {key} of this model"
        )
    if OTHER in found - layers:
        raise DroppeftError(
            f"adapter.type={name} has trainable tensors outside the layers of this model"
        )


def _strip(backbone: nn.Module) -> None:
    """Restore every module that an adapter replaced. peft's ``unload`` fails on some heads."""
    for name, module in list(backbone.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            backbone.set_submodule(name, module.original_module)
        elif isinstance(module, BaseTunerLayer):
            backbone.set_submodule(name, module.get_base_layer())
    remove_bottlenecks(backbone)
    vars(backbone).pop("peft_config", None)
    backbone.requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft uses a deprecated attribute of transformers, and warns about choices that it makes
        # for small models or without a compiler. Users cannot do anything about either.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        yield


def _sorted_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted_lists(item) for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value
