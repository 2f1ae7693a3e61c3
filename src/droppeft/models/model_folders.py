"""Check the files of a model's folder before transformers reads them; ours.

transformers reports what it finds deep inside a file, unpickles the text of a Git LFS pointer, and
takes an adapter's base model for the model that was asked for. Here a user reads in one sentence
what is wrong and what to do.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from droppeft.errors import DroppeftError
from droppeft.git_lfs import check_no_pointer

CONFIG = "config.json"
PEFT_CONFIG = "adapter_config.json"
ADAPTER_CONFIGS = (PEFT_CONFIG, "bottleneck_config.json")
"""Files that describe an adapter, of peft (and AdapterHub) and of :mod:`droppeft.adapters`."""

_SAFETENSORS, _PICKLES = "*.safetensors", "pytorch_model*.bin"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKENIZER_AND_SETTINGS = ("*.json", "*.model", "vocab.txt", "merges.txt")


def check_folder(folder: Path) -> None:
    """Check that a folder holds a model whose files are whole.

    Args:
        folder: of a model in transformers' format.

    Raises:
        DroppeftError: it is an adapter, a run or a folder of checkpoints, a file is a Git LFS
            pointer, a file of weights is missing or cut off, or ``config.json`` has no
            ``model_type``.
    """
    check_no_adapter(str(folder), _adapter_config(folder))
    for pattern in _TOKENIZER_AND_SETTINGS:
        for path in sorted(folder.glob(pattern)):
            check_no_pointer(path)
    _check_config(folder)
    _check_weights(folder)


def check_has_weights(folder: Path) -> None:
    """Check that a folder has files of weights that transformers reads.

    Raises:
        DroppeftError: it has none.
    """
    if not any(any(folder.glob(pattern)) for pattern in (_SAFETENSORS, _PICKLES)):
        raise DroppeftError(
            f"model={folder}: the folder has no weights (model.safetensors); download them too, or "
            "save the model with save_pretrained of transformers"
        )


def check_no_adapter(name: str, description: Path | None) -> None:
    """Refuse an adapter, for which transformers would load another model.

    Args:
        name: the setting ``model``, for the message.
        description: the adapter's configuration; ``None`` if there is none.

    Raises:
        DroppeftError: there is one.
    """
    if description is None:
        return
    base = _read_json(description).get("base_model_name_or_path") or "MODEL"
    further = f", or set model={base} start_from={name}" if description.name == PEFT_CONFIG else ""
    raise DroppeftError(
        f"model={name}: is an adapter ({description.name}), not a model; merge it into its model "
        f"first (droppeft export RUN --merge, or peft's merge_and_unload){further}"
    )


def check_depth(name: str, unused: Collection[str], blocks_path: str, layers: int) -> None:
    """Refuse files with more layers than the configuration, which transformers would leave out.

    Args:
        name: the setting ``model``, for the message.
        unused: names of weights that transformers did not use.
        blocks_path: dotted name of the list of layers.
        layers: L, as in the configuration.

    Raises:
        DroppeftError: a weight belongs to a layer L or above.
    """
    # Files may leave out the name of the model inside the classifier.
    beginnings = (f"{blocks_path}.", f"{blocks_path.partition('.')[2]}.")
    for key in sorted(unused):
        beginning = next(filter(key.startswith, beginnings), None)
        number = key.removeprefix(beginning or key).partition(".")[0]
        if number.isdecimal() and int(number) >= layers:
            raise DroppeftError(
                f"model={name}: its files have more than the {layers} layers that its {CONFIG} "
                f"names (such as {key}); use the {CONFIG} that belongs to the weights"
            )


def _adapter_config(folder: Path) -> Path | None:
    return next((folder / name for name in ADAPTER_CONFIGS if (folder / name).is_file()), None)


def _check_config(folder: Path) -> None:
    path, where = folder / CONFIG, f"model={folder}"
    if not path.is_file():
        raise DroppeftError(f"{where}: the folder has no {CONFIG}{_instead(folder)}")
    content = _read_json(path)
    if not isinstance(content.get("model_type"), str):
        raise DroppeftError(
            f"{where}: its {CONFIG} has no model_type, which says what kind of model it is; "
            "download the file again, or save the model with save_pretrained of transformers"
        )


def _instead(folder: Path) -> str:
    """What the user may have meant by a folder without a model."""
    if (folder / "config.toml").is_file():
        return (
            f", it is a run; write its model with: droppeft export {folder} --merge --out MODEL, "
            "and set model=MODEL"
        )
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if inside:
        return f"; models are in folders inside of it, such as {inside[-1]}"
    return "; name a folder that save_pretrained of transformers wrote, or a hub id"


def _check_weights(folder: Path) -> None:
    """Check the files of weights that transformers would read: safetensors, or else pickles."""
    for index in _INDEXES:
        if (folder / index).is_file():
            _check_shards(folder, index)
    whole = sorted(folder.glob(_SAFETENSORS))
    for path in whole or sorted(folder.glob(_PICKLES)):
        check_no_pointer(path)
    for path in whole:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise DroppeftError(
                f"model={folder}: {path.name} is damaged or cut off ({error}); download it again"
            ) from None


def _check_shards(folder: Path, index: str) -> None:
    shards = _read_json(folder / index).get("weight_map")
    names = sorted({*map(str, shards.values())}) if isinstance(shards, dict) else []
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        what = f"names {missing[0]}, which is missing" if missing else "names no files"
        raise DroppeftError(f"model={folder}: {index} {what}; download the model again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        content, reason = None, str(error)
    else:
        reason = "it is no JSON object"
    if not isinstance(content, dict):
        raise DroppeftError(
            f"model={path.parent}: {path.name} cannot be read ({reason}); download it again"
        )
    return content
