"""Where a model's weights and tokenizer are read from, and reading them; ours."""

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.utils import find_adapter_config_file

from droppeft.errors import DroppeftError
from droppeft.extras import require
from droppeft.layer_dropout import find_blocks
from droppeft.models.gguf import converted_gguf, is_converted
from droppeft.models.model_folders import (
    check_depth,
    check_folder,
    check_has_weights,
    check_no_adapter,
)
from droppeft.models.packaged import builtin_model_folder, mpnet_folder, smollm2_file
from droppeft.models.quantization import check_not_prequantised, loading_options

PACKAGED: dict[str, Callable[[], Path]] = {
    "builtin": builtin_model_folder,
    "mpnet": mpnet_folder,
    "smollm2": smollm2_file,
}
"""By name of the setting ``model``, where the package's folder or GGUF file is."""

_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Data types by their names in safetensors files."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spm.model")


@dataclass(frozen=True)
class ModelSource:
    """Files of a model.

    Attributes:
        path: a folder, or an id of the Hugging Face Hub.
        gguf_file: name of the GGUF file in the folder that holds weights, configuration and
            tokenizer; ``None`` for a model in transformers' own format.
    """

    path: str
    gguf_file: str | None = None

    @property
    def name(self) -> str:
        """The path of the GGUF file, the folder, or the hub id."""
        return self.path if self.gguf_file is None else str(Path(self.path) / self.gguf_file)

    @property
    def readable(self) -> str:
        """The folder or hub id that transformers reads. A GGUF file is converted at first use."""
        return self.path if self.gguf_file is None else str(converted_gguf(Path(self.name)))

    def convert(self, say: Callable[[str], None]) -> None:
        """Convert a GGUF file, and say so, since it takes up to minutes.

        A file that was converted before, and any other model, is left as it is.

        Args:
            say: called with what is being done.

        Raises:
            DroppeftError: as :func:`~droppeft.models.gguf.converted_gguf`.
        """
        if self.gguf_file is not None and not is_converted(Path(self.name)):
            say(f"converting {self.gguf_file}, once for all runs")
            converted_gguf(Path(self.name))

    def load(self, load: Callable[..., Any], **options: Any) -> Any:
        """Call a ``from_pretrained`` of transformers. The first one of a GGUF file converts it.

        Code that comes with a model is never run, and a pickle is read as tensors only.

        Raises:
            DroppeftError: the files are missing, damaged or of an unsupported kind.
        """
        return self._load(load, "", options)

    def _load(self, load: Callable[..., Any], what: str, options: dict[str, Any]) -> Any:
        path = self.readable
        if Path(path).is_dir():
            check_folder(Path(path))
        else:
            check_no_adapter(path, _adapter_on_hub(path))
        try:
            return load(path, trust_remote_code=False, **options)
        except Exception as error:  # damaged files raise errors of many kinds
            where, reason = f"from this {self._kind()}", _reason(error)
            raise DroppeftError(
                f"model={self.name}: {what}cannot be loaded {where}: {reason}"
            ) from None

    def load_model(
        self,
        auto: Any,
        quantization: str,
        heads: Sequence[str],
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Load the weights on the CPU.

        Args:
            auto: transformers' auto class for the head.
            quantization: ``"none"``, ``"8bit"`` or ``"4bit"``.
            heads: names of modules that are not quantised.
            dtype: of all weights that are not quantised.
            options: further arguments of ``from_pretrained``.

        Returns:
            The model, and transformers' report of missing and mismatched weights.

        Raises:
            DroppeftError: as :meth:`load`, it is an adapter, its weights have more layers than its
                configuration, or they are quantised already.
        """
        folder = Path(self.readable)
        if folder.is_dir():
            check_has_weights(folder)
        model, report = self.load(
            auto.from_pretrained,
            dtype=dtype,
            output_loading_info=True,
            **loading_options(quantization, heads),
            **options,
        )
        check_not_prequantised(model, self.name)
        blocks_path, blocks = find_blocks(model)
        check_depth(self.name, report["unexpected_keys"], blocks_path, len(blocks))
        return model, report

    def is_stored_in(self, dtype: torch.dtype) -> bool:
        """Whether all weights in the files, as far as they are on this machine, have a type."""
        folder, kinds = Path(self.readable), set[str]()
        if not folder.is_dir():
            on_hub = try_to_load_from_cache(self.readable, "config.json")
            folder = Path(on_hub).parent if isinstance(on_hub, str) else folder
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                kinds |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        return kinds == {_STORED.get(dtype)}

    def load_tokenizer(self) -> Any:
        """Load the tokenizer, with its chat template if it has one.

        Raises:
            DroppeftError: it is missing or damaged.
        """
        folder = Path(self.path)
        # For a folder without a tokenizer, transformers would make an empty one.
        known = self.gguf_file is not None or any(
            (folder / name).exists() for name in TOKENIZER_FILES
        )
        if folder.is_dir() and not known:
            names = ", ".join(TOKENIZER_FILES)
            raise DroppeftError(f"model={self.path}: the folder has no tokenizer (one of {names})")
        return self._load(AutoTokenizer.from_pretrained, "its tokenizer ", {})

    def _kind(self) -> str:
        if self.gguf_file is not None or Path(self.path).exists():
            return "folder"
        if constants.HF_HUB_OFFLINE:
            return (
                "hub id (check the id; HF_HUB_OFFLINE is set, so only models downloaded before can "
                "be loaded)"
            )
        return "hub id (check the id and the network)"


def find_source(name: str) -> ModelSource:
    """Find the files of a model, without reading them.

    Args:
        name: a key of :data:`PACKAGED`, the path of a GGUF file, a folder, or a hub id.

    Raises:
        DroppeftError: there is no such file or folder, or a package is missing.
    """
    path = PACKAGED[name]() if name in PACKAGED else Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DroppeftError(f"model={name}: no such file")
        require("llm", f"model={name}")
        return ModelSource(str(path.parent), path.name)
    # A missing folder would otherwise be looked up on the hub.
    if name.startswith((".", "/", "~", "$")) and not path.is_dir():
        raise DroppeftError(f"model={name}: no such folder")
    return ModelSource(str(path) if name in PACKAGED else name)


@cache
def _adapter_on_hub(name: str) -> Path | None:
    """The downloaded configuration of an adapter, if a hub id is that of an adapter."""
    found = find_adapter_config_file(name)
    return Path(found) if found else None


def _reason(error: Exception) -> str:
    """Why transformers could not load a model, in a part of a sentence."""
    if isinstance(error, pickle.UnpicklingError | EOFError) or "PytorchStreamReader" in str(error):
        return (
            "a file of weights is damaged, or it is a pickle with more than tensors, which might "
            "run code and is not read; download it again, or use files with the ending .safetensors"
        )
    if "trust_remote_code" in str(error):
        return (
            "it needs code that comes with it (trust_remote_code), which is never run here; use a "
            "model that is part of transformers"
        )
    # Of several sentences, the first says what is wrong; it may have several lines.
    first = re.split(r"\.\s*\n|\n\s*\n", str(error).strip())[0]
    text = " ".join(first.split()).rstrip(".")
    if isinstance(error, OSError | ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
