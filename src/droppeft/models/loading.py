"""Load a backbone, and the heads of sequence classifiers; ours.

:mod:`droppeft.models.causal_lm` loads models that generate text.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks
from droppeft.models.architectures import architecture
from droppeft.models.classifier_head import arrange_head, matching_rows, own_classes
from droppeft.models.quantization import (
    check_installed,
    copy_dequantised_values,
    patch_quantised_layers,
    quantised,
)
from droppeft.models.quiet import quiet
from droppeft.models.sources import ModelSource, find_source
from droppeft.models.weights_hash import cached_hash

HEAD_MODULES: tuple[str, ...] = (
    "classifier",
    "score",
    "pooler",
    "pre_classifier",
    "head",
    "classification_head",
)
"""Names of modules between the last layer and the classes, in transformers' models."""

LAST_MODULES = ("classifier", "score", "classification_head")
"""Those of :data:`HEAD_MODULES` whose outputs are the classes."""


@dataclass(frozen=True)
class BackboneConfig:
    """What is known of a backbone before its weights are loaded.

    Attributes:
        config: transformers' configuration, with the task's classes.
        new_modules: parts of the head that must be trained, as in :class:`Backbone`. Without
            files of weights to look into, all are taken to be new.
    """

    config: Any
    new_modules: tuple[str, ...]


@dataclass(frozen=True)
class Backbone:
    """A model with a head, its tokenizer and its properties.

    Attributes:
        model: a sequence classifier with a head for the task's classes, or a causal language model;
            frozen once an adapter is attached.
        tokenizer: transformers' fast tokenizer, which pads on the right.
        source: the files that the model was loaded from; the path is ``config:ARCHITECTURE`` if
            there are none.
        blocks_path: dotted name of its list of layers.
        num_layers: L.
        parameters: number of its parameters, head included.
        inputs: names of the token columns that the model takes.
        max_length: largest number of tokens that the model has positions for.
        weights_hash: of all weights but a classifier's head; see
            :func:`~droppeft.models.weights_hash.hash_weights`.
        new_modules: parts of the head without pretrained values, which must be trained. (A pooler
            may have pretrained values.) None in a causal language model.
        sets_padding: whether the padding token, in the tokenizer or in the model's configuration,
            is not the one that the files name.
    """

    model: nn.Module
    tokenizer: Any
    source: ModelSource
    blocks_path: str
    num_layers: int
    parameters: int
    inputs: tuple[str, ...]
    max_length: int
    weights_hash: str
    new_modules: tuple[str, ...]
    sets_padding: bool

    @classmethod
    def of(
        cls, model: nn.Module, tokenizer: Any, source: ModelSource, new_modules: Sequence[str] = ()
    ) -> "Backbone":
        """Set up padding and quantised layers, and find the properties of a model.

        Raises:
            DroppeftError: the architecture is not supported, or the tokenizer cannot pad.
        """
        check_finite(model, source.name)
        patch_quantised_layers(model)
        sets_padding = set_padding(model, tokenizer, source.name)
        blocks_path, blocks = find_blocks(model)
        return cls(
            model=model,
            tokenizer=tokenizer,
            source=source,
            blocks_path=blocks_path,
            num_layers=len(blocks),
            parameters=sum(value.numel() for value in model.parameters()),
            inputs=token_inputs(model),
            max_length=most_tokens(model),
            weights_hash=cached_hash(model, HEAD_MODULES, source.readable),
            new_modules=tuple(new_modules),
            sets_padding=sets_padding,
        )

    @property
    def path(self) -> str:
        """What the model was loaded from: a folder, a GGUF file, a hub id or an architecture."""
        return self.source.name


def load_backbone(
    name: str, label_names: Sequence[str], seed: int, quantization: str = "none"
) -> Backbone:
    """Load a sequence classifier: weights (fp32) and tokenizer.

    The head is new unless the files have one for these classes, whose rows are then put into their
    order. Classes are compared by name; see :mod:`droppeft.models.classifier_head`.

    Args:
        name: ``builtin``, ``mpnet``, ``smollm2``, a hub id, a local folder, a GGUF file, or
            ``config:ARCHITECTURE``.
        label_names: classes, in the order of their indices.
        seed: for the head's (and an architecture's) initial values.
        quantization: ``"8bit"`` or ``"4bit"`` for all linear maps but the head's; the model stays
            on the CPU until :func:`~droppeft.models.quantization.on_device` moves it.

    Raises:
        DroppeftError: the model is unknown, unreadable or unsupported, or bitsandbytes is missing.
    """
    check_installed(quantization)
    options = _label_options(label_names)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.startswith("config:"):
            source, new = ModelSource(name), HEAD_MODULES
            model, tokenizer = _from_architecture(
                name.removeprefix("config:"), options, quantization
            )
        else:
            source = find_source(name)
            model, tokenizer, new = _from_weights(source, label_names, quantization)
    return Backbone.of(model, tokenizer, source, new)


def load_backbone_config(name: str, label_names: Sequence[str]) -> BackboneConfig:
    """Load a backbone's configuration, without weights or tokenizer.

    Args:
        name: as in :func:`load_backbone`; from the hub only the configuration is fetched.
        label_names: classes, in the order of their indices.

    Raises:
        DroppeftError: the model is unknown, unreadable or unsupported.
    """
    options = _label_options(label_names)
    if name.startswith("config:"):
        sizes = architecture(name.removeprefix("config:"))
        config = AutoConfig.for_model(**sizes, pad_token_id=0, **options)
        return BackboneConfig(config, HEAD_MODULES)
    source = find_source(name)
    with quiet():
        config = source.load(AutoConfig.from_pretrained, **options)
    if config.get_text_config().pad_token_id is None:
        set_padding_token(config, 0)
    names = {part for key in _weight_names(Path(source.path)) for part in key.split(".")}
    return BackboneConfig(config, tuple(part for part in HEAD_MODULES if part not in names))


def _weight_names(folder: Path) -> Iterator[str]:
    """Names of the weights in a folder's safetensors files, if there are any."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


def load_dequantised(
    name: str, label_names: Sequence[str], seed: int, quantization: str
) -> Backbone:
    """Like :func:`load_backbone`, but in fp32 with the dequantised values of the quantised weights.

    ``weights_hash`` is that of the quantised weights.
    """
    quantised_backbone = load_backbone(name, label_names, seed, quantization)
    plain = load_backbone(name, label_names, seed)
    copy_dequantised_values(quantised_backbone.model, plain.model)
    return replace(plain, weights_hash=quantised_backbone.weights_hash)


def check_finite(model: nn.Module, name: str) -> None:
    """Check that no weight is infinite or not a number.

    Args:
        model: of transformers.
        name: the setting ``model``, for the message.

    Raises:
        DroppeftError: a weight is.
    """
    for key, value in model.named_parameters():
        # A sum needs no memory of the weight's size; it may overflow where every value is finite.
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():
            raise DroppeftError(
                f"model={name}: its weight {key} has values that are infinite or not a number; "
                "download the files again, or use another checkpoint"
            )


def _from_weights(
    source: ModelSource, label_names: Sequence[str], quantization: str
) -> tuple[nn.Module, Any, tuple[str, ...]]:
    own = own_classes(source.load(AutoConfig.from_pretrained), source.name)
    model, report = source.load_model(
        AutoModelForSequenceClassification,
        quantization,
        HEAD_MODULES,
        ignore_mismatched_sizes=True,  # a head for other classes is replaced
        **_label_options(label_names),
    )
    new = _new_modules(source.name, report)
    if not set(new) & set(LAST_MODULES):
        rows = matching_rows(own, label_names)
        replaced = arrange_head(model, rows, HEAD_MODULES, source.name)
        new = tuple(name for name in HEAD_MODULES if name in {*new, replaced})
    return model, source.load_tokenizer(), new


def _new_modules(path: str, report: dict[str, Any]) -> tuple[str, ...]:
    """Modules without weights in the checkpoint, which may only be parts of the head."""
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    keys = sorted({*report["missing_keys"], *mismatched})
    for key in keys:
        if not set(key.split(".")) & set(HEAD_MODULES):
            raise DroppeftError(f"model={path}: its files have no fitting weights for {key}")
    return tuple(name for name in HEAD_MODULES if any(name in key.split(".") for key in keys))


def _from_architecture(
    name: str, options: dict[str, Any], quantization: str
) -> tuple[nn.Module, Any]:
    sizes = architecture(name)
    tokenizer = find_source("builtin").load_tokenizer()
    config = AutoConfig.for_model(**sizes, pad_token_id=tokenizer.pad_token_id, **options)
    model = AutoModelForSequenceClassification.from_config(config)
    return quantised(model, quantization, HEAD_MODULES), tokenizer


def _label_options(label_names: Sequence[str]) -> dict[str, Any]:
    labels = dict(enumerate(label_names))
    return {
        "id2label": labels,
        "label2id": {label: i for i, label in labels.items()},
        "problem_type": "single_label_classification",
    }


def text_config(model: Any) -> Any:
    """The configuration of the part of a model that reads text, which may be nested in another."""
    return model.config.get_text_config()


def set_padding(model: nn.Module, tokenizer: Any, name: str) -> bool:
    """Pad on the right; a tokenizer without a padding token pads with its end-of-text token.

    Returns whether tokenizer or configuration had another padding token, or none.

    Args:
        model: is told which token pads, since a decoder with a head reads the last other token.
        tokenizer: of the model.
        name: the setting ``model``, for the message.

    Raises:
        DroppeftError: there is no such token, or the model has no embedding for it.
    """
    has_token = tokenizer.pad_token is not None
    if not has_token:
        if tokenizer.eos_token is None:
            raise DroppeftError(
                f"model={name}: its tokenizer has neither a padding nor an end-of-text token; name "
                "one in tokenizer_config.json (pad_token)"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    pad, known = tokenizer.pad_token_id, embedding_rows(model)
    if not 0 <= pad < known:
        raise DroppeftError(
            f"model={name}: its tokenizer pads with {tokenizer.pad_token!r}, token {pad}, but the "
            f"model has embeddings for {known} tokens only (0 to {known - 1}); name another token "
            "in tokenizer_config.json (pad_token), or add the embedding (resize_token_embeddings)"
        )
    # In a model that counts positions from after its padding token, all would change.
    differs = text_config(model).pad_token_id != pad and not _unused_positions(model)
    if differs:
        set_padding_token(model.config, pad)
    return differs or not has_token


def set_padding_token(config: Any, token: int) -> None:
    """Set the token that pads in a configuration and in the one of its text model."""
    config.get_text_config().pad_token_id = token
    if hasattr(config, "pad_token_id"):
        config.pad_token_id = token


def embedding_rows(model: nn.Module) -> int:
    """Number of tokens that a model has embeddings for."""
    rows: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return rows


def most_tokens(model: nn.Module) -> int:
    """The largest number of tokens that a model has positions for.

    Rotary and relative positions have no limit, but the model was not trained beyond the number in
    its configuration.
    """
    config: Any = text_config(model)
    return int(getattr(config, "max_position_embeddings", sys.maxsize)) - _unused_positions(model)


def _unused_positions(model: nn.Module) -> int:
    """Positions that no token has: models like RoBERTa count from after their padding token."""
    unused = (
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and name.endswith("position_embeddings")
        and module.padding_idx is not None
    )
    return max(unused, default=0)


def check_tokens(model: nn.Module, highest: int) -> None:
    """Check that a model has embeddings for the tokens of its tokenizer.

    Args:
        model: of transformers, also with an adapter of peft.
        highest: the largest token id that is used.

    Raises:
        DroppeftError: there is no embedding for it.
    """
    known = embedding_rows(model)
    if highest >= known:
        raise DroppeftError(
            f"the tokenizer makes the token {highest}, but the model has embeddings for {known} "
            f"tokens only (0 to {known - 1}); use the tokenizer that belongs to the model"
        )


def token_inputs(model: nn.Module) -> tuple[str, ...]:
    """Names of the token columns that a model takes."""
    config: Any = text_config(model)
    has_segments = (getattr(config, "type_vocab_size", None) or 0) > 1
    return ("input_ids", "token_type_ids") if has_segments else ("input_ids",)
