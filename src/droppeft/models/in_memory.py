"""Save a loaded model in a folder that a run reads, now and when it is resumed. Ours."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from droppeft.errors import DroppeftError
from droppeft.models.quiet import quiet


def save_model(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save a model of transformers with its tokenizer in ``folder/HASH``, and return that folder.

    The same model with the same tokenizer is saved once.

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch, quiet():
            inside = Path(scratch) / "model"
            model.save_pretrained(inside)
            tokenizer.save_pretrained(inside)
            saved = folder / _hash(inside)
            if not saved.is_dir():
                inside.rename(saved)
    except OSError as error:
        raise DroppeftError(f"{folder}: cannot be written ({error.strerror}); set out") from None
    return saved.absolute()


def _hash(folder: Path) -> str:
    """Return a hash of all files of a saved model: weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
