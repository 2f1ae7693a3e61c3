"""GGUF files, as llama.cpp writes them, in transformers' own format.

Reading a GGUF file takes transformers many seconds, since it parses the file anew for each of
configuration, weights and tokenizer. The file is therefore converted once.
"""

import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    modeling_gguf_pytorch_utils,
)

from droppeft.errors import DroppeftError
from droppeft.git_lfs import check_no_pointer
from droppeft.models.cached_folder import cached_folder, models_folder
from droppeft.models.key_value_cache import set_temporarily
from droppeft.models.quiet import quiet

_MAGIC = b"GGUF"
_MARKS = ("hf_quantizer", "quantization_method", "is_quantized")


@cache
def converted_gguf(file: Path) -> Path:
    """Return a folder with the weights of a GGUF file, dequantised to fp32, and its tokenizer.

    It is in the cache folder and takes four bytes per parameter. Its name is a hash of the file's
    content.

    Raises:
        DroppeftError: the file is damaged, its architecture is not supported by transformers, or
            the disk is full.
    """
    return cached_folder(_name(file), str(file), partial(_convert, file))


def is_converted(file: Path) -> bool:
    """Return whether the cache folder has the converted GGUF file."""
    return (models_folder() / _name(file)).is_dir()


@cache
def _name(file: Path) -> str:
    """Return the name of the folder with the converted file."""
    with file.open("rb") as content:
        return f"gguf-{hashlib.file_digest(content, 'sha256').hexdigest()[:16]}"


@quiet()
def _convert(file: Path, folder: Path) -> None:
    _check_whole(file)
    model = _read(AutoModelForCausalLM.from_pretrained, file, dtype=torch.float32, **_dequantised())
    # With these marks transformers would not save the model, or quantise it when it is loaded.
    for name in _MARKS:
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    _read(AutoTokenizer.from_pretrained, file).save_pretrained(folder)


def _dequantised() -> dict[str, Any]:
    return {"quantization_config": GgufConfig(dequantize=True)}


def _check_whole(file: Path) -> None:
    """Refuse what is no GGUF file, or only the text that stands for one."""
    check_no_pointer(file)
    with file.open("rb") as content:
        if content.read(len(_MAGIC)) != _MAGIC:
            raise DroppeftError(
                f"model={file}: is no GGUF file (it does not begin with GGUF); download it again"
            )


def _read(load: Callable[..., Any], file: Path, **options: Any) -> Any:
    # The reader's progress bar is not one that transformers can be told to leave out.
    with set_temporarily(modeling_gguf_pytorch_utils, "tqdm", lambda items, **_: items):
        try:
            return load(str(file.parent), gguf_file=file.name, trust_remote_code=False, **options)
        except Exception as error:  # the reader's errors on damaged files are of many kinds
            lines = str(error).strip().splitlines()
            raise DroppeftError(
                f"model={file}: cannot be loaded from this GGUF file: "
                f"{lines[0] if lines else type(error).__name__}; download it again if it is cut off"
            ) from None
