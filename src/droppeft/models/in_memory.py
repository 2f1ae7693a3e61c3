"""Save a loaded model in a folder that a run reads, now and when it is resumed. Ours."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from droppeft.errors import DroppeftError
from droppeft.models.quiet import quiet


def save_model(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save a model of transformers with its tokenizer in ``folder/HASH``, and return that folder.

    The same weights with the same tokenizer are saved once.

    Raises:
        DroppeftError: it is no model of transformers, it has no tokenizer, or it cannot be written.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        hint = "; merge its adapter first (merge_and_unload)" if "Peft" in kind else ""
        raise DroppeftError(f"model is of type {kind}, which is no model of transformers{hint}")
    if tokenizer is None:
        raise DroppeftError("a loaded model needs its tokenizer; give it as tokenizer=")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        wrong = type(tokenizer).__name__
        raise DroppeftError(f"tokenizer is of type {wrong}, which is no tokenizer of transformers")
    saved = folder / _hash(model, tokenizer)
    if saved.is_dir():
        return saved.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch, quiet():
            inside = Path(scratch) / saved.name
            model.save_pretrained(inside)
            tokenizer.save_pretrained(inside)
            inside.rename(saved)
    except OSError as error:
        raise DroppeftError(f"{folder}: cannot be written ({error.strerror}); set out") from None
    return saved.absolute()


def _hash(model: PreTrainedModel, tokenizer: Any) -> str:
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, value in model.state_dict().items():
        plain = value.detach().cpu().contiguous().flatten()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    digest.update(f"{vocabulary}{rules}{tokenizer.chat_template}".encode())
    return digest.hexdigest()[:16]
