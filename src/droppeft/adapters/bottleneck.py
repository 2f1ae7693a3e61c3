"""Bottleneck adapters and their file format; peft has neither.

Source: Houlsby et al. (arXiv:1902.00751). A layer has an adapter after its attention and one after
its feed-forward network, before the residual connection. An adapter is a down-projection to
``width``, GELU, an up-projection and a skip connection. Initialising the up-projection with zeros
is ours: a new adapter does not change the output at all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks

_BERT = {"attention": "attention.output.dropout", "feed_forward": "output.dropout"}

PLACES: dict[str, dict[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "deberta-v2": _BERT,
    "gpt2": {"attention": "attn.resid_dropout", "feed_forward": "mlp.dropout"},
    "llama": {"attention": "self_attn.o_proj", "feed_forward": "mlp.down_proj"},
}
"""By ``config.model_type`` and place, the module of a layer whose output the adapter changes."""

TENSORS, CONFIG = "adapter_model.safetensors", "bottleneck_config.json"
FORMAT = "droppeft bottleneck 1"


class Bottleneck(nn.Module):
    """A bottleneck adapter. Input and output have shape (..., H).

    Args:
        hidden_size: H.
        width: size of the bottleneck.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, width)
        self.up = nn.Linear(width, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input plus the bottleneck's output, in the dtype of the input."""
        change: torch.Tensor = self.up(
            functional.gelu(self.down(hidden.to(self.down.weight.dtype)))
        )
        return hidden + change.to(hidden.dtype)


@dataclass(frozen=True)
class Shape:
    """Places and widths of bottleneck adapters; the content of ``bottleneck_config.json``.

    Attributes:
        model_type: architecture of the backbone.
        places: ``attention``, ``feed_forward`` or both.
        widths: width in each layer, ``None`` for a layer without adapters.
        base_model: name or path that the backbone was loaded from.
        format: name and version of the file format.
    """

    model_type: str
    places: tuple[str, ...]
    widths: tuple[int | None, ...]
    base_model: str = ""
    format: str = FORMAT


def places_of(model: Any, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Return the places that ``adapter.targets`` names; all of them by default.

    Raises:
        DroppeftError: if a place or the architecture is unknown.
    """
    model_type = model.config.model_type
    if model_type not in PLACES:
        raise DroppeftError(
            f"bottlenecks are not supported for {model_type!r}, only for {', '.join(PLACES)}"
        )
    known = PLACES[model_type]
    chosen = tuple(known) if targets == ("default",) else targets
    for place in chosen:
        if place not in known:
            raise DroppeftError(
                f"adapter.targets: a bottleneck has no place {place!r}; it has {', '.join(known)}"
            )
    return tuple(place for place in known if place in chosen)


def attach_bottlenecks(
    model: Any,
    widths: Sequence[int | None],
    places: Sequence[str],
    heads: Sequence[str],
) -> nn.Module:
    """Insert new adapters into ``model``, initialised by torch's generator, and freeze the rest.

    Args:
        widths: width in each layer, ``None`` for a layer without adapters.
        places: places in a layer, as :func:`places_of` returns them.
        heads: last part of the names of modules of which a copy is trained in full.
    """
    model.requires_grad_(False)
    _insert(model, widths, places)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in heads:
            wrapper = ModulesToSaveWrapper(module, "default")
            wrapper.set_adapter("default")
            model.set_submodule(name, wrapper)
    wrapped: nn.Module = model
    return wrapped


def remove_bottlenecks(model: nn.Module) -> None:
    """Remove the adapters from ``model``. Heads do not change."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Bottleneck):
            vars(module)["hook"].remove()
            parent, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(parent), leaf)


def save_bottlenecks(model: Any, folder: Path) -> None:
    """Write adapters and trained heads to a folder. The same tensors give the same bytes.

    ``adapter_model.safetensors`` holds the tensors under their names in the backbone, and
    ``bottleneck_config.json`` a :class:`Shape`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.replace(".modules_to_save.default", ""): value.detach().cpu().contiguous()
        for name, value in model.named_parameters()
        if ".bottleneck_" in name or ".modules_to_save." in name
    }
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    text = json.dumps(asdict(_shape(model)), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_bottleneck(model: Any, folder: str | Path) -> Any:
    """Load saved adapters and heads into a transformers model, in place, and return it.

    ``peft`` cannot read this format. Example::

        model = AutoModelForSequenceClassification.from_pretrained(base, id2label=id2label)
        model = load_bottleneck(model, "adapter").eval()

    Args:
        model: a model of the architecture and size, and with the number of classes, that the
            adapters were trained with.
        folder: the exported folder.

    Raises:
        DroppeftError: if the folder is unreadable or the model does not fit.
    """
    folder = Path(folder)
    shape, tensors = _read(folder)
    _check_fits(model, shape, folder)
    _insert(model, shape.widths, shape.places)
    try:
        report = model.load_state_dict(tensors, strict=False)
        missing = [name for name in report.missing_keys if ".bottleneck_" in name]
        different = [*report.unexpected_keys, *missing]
        reason = f"only one of them has the tensor {different[0]}" if different else ""
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
    if reason:
        remove_bottlenecks(model)
        raise DroppeftError(f"the adapter in {folder} does not fit this model: {reason}")
    return model


def _insert(model: Any, widths: Sequence[int | None], places: Sequence[str]) -> None:
    _, blocks = find_blocks(model)
    paths = PLACES[model.config.model_type]
    for block, width in zip(blocks, widths, strict=True):
        if width is not None:
            for place in places:
                adapter = Bottleneck(model.config.hidden_size, width)
                hook = block.get_submodule(paths[place]).register_forward_hook(
                    _ApplyAdapter(adapter)
                )
                vars(adapter)["hook"] = hook
                block.add_module(f"bottleneck_{place}", adapter.to(next(block.parameters()).device))


class _ApplyAdapter:
    """Forward hook that applies an adapter to a module's output.

    It is no ``nn.Module``, so that the adapter is not registered a second time.
    """

    def __init__(self, adapter: Bottleneck) -> None:
        self.adapter = adapter

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = self.adapter(output)
        return changed


def _shape(model: Any) -> Shape:
    _, blocks = find_blocks(model)
    inside = [
        {name: child for name, child in block.named_children() if isinstance(child, Bottleneck)}
        for block in blocks
    ]
    names = {name.removeprefix("bottleneck_") for adapters in inside for name in adapters}
    widths = [{adapter.down.out_features for adapter in found.values()} for found in inside]
    return Shape(
        model_type=model.config.model_type,
        places=tuple(place for place in PLACES[model.config.model_type] if place in names),
        widths=tuple(min(found) if found else None for found in widths),
        base_model=str(model.name_or_path),
    )


def _read(folder: Path) -> tuple[Shape, Mapping[str, torch.Tensor]]:
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
        tensors: Mapping[str, torch.Tensor] = load_file(folder / TENSORS)
        shape = TypeAdapter(Shape).validate_json(text)
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise DroppeftError(f"{folder} has no readable bottleneck adapter ({error})") from None
    except ValidationError:
        raise DroppeftError(
            f"{folder / CONFIG} is not a configuration that droppeft wrote"
        ) from None
    if shape.format != FORMAT:
        raise DroppeftError(f"{folder / CONFIG} has format {shape.format!r}, not {FORMAT!r}")
    return shape, tensors


def _check_fits(model: Any, shape: Shape, folder: Path) -> None:
    _, blocks = find_blocks(model)
    found, expected = (
        f"{kind} of {layers} layers"
        for kind, layers in (
            (model.config.model_type, len(blocks)),
            (shape.model_type, len(shape.widths)),
        )
    )
    if found != expected:
        raise DroppeftError(f"the adapter in {folder} is for a {expected}, not for a {found}")
    if any(isinstance(module, Bottleneck) for module in model.modules()):
        raise DroppeftError("this model already has bottlenecks; load the model again")
