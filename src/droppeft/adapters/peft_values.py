"""Load the values of an adapter that PEFT saved into an attached adapter; ours."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from droppeft.errors import DroppeftError
from droppeft.models.model_folders import PEFT_CONFIG

PEFT_WEIGHTS = "adapter_model.safetensors"

WITHOUT_EFFECT = ("r", "inference_mode", "lora_dropout")
"""Numbers in PEFT's configuration that need not agree: shapes show the rank, and the others do not
change what trained values mean."""


def load_peft_values(model: Any, folder: Path, trained: Collection[str]) -> None:
    """Load the values of an adapter in PEFT's format into a model with an attached adapter.

    Args:
        model: with an adapter of a type of PEFT.
        folder: of the saved adapter.
        trained: names of the tensors that must be in the folder.

    Raises:
        DroppeftError: the folder cannot be read, or the saved adapter is another one than the
            attached one. The model may have some of the values then.
    """
    if not isinstance(model, PeftModel):
        raise DroppeftError("an adapter of this type is no adapter of PEFT; name a run")
    try:
        config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / PEFT_WEIGHTS)
        if not isinstance(config, dict):
            raise ValueError(f"{PEFT_CONFIG} is no JSON object")
    except (OSError, ValueError, SafetensorError) as error:
        raise DroppeftError(f"cannot be read ({error})") from None
    _check_same_settings(config, model.active_peft_config.to_dict())
    try:
        found = set_peft_model_state_dict(model, weights)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DroppeftError(f"does not fit this run's adapter: {reason}") from None
    missing = sorted({*trained} & {*found.missing_keys})
    for name in (*missing, *found.unexpected_keys):
        what = "lacks" if name in missing else "has also"
        raise DroppeftError(
            f"{what} {name}, unlike this run's adapter; use the same adapter.type, "
            "adapter.targets and frozen.layers"
        )


def _check_same_settings(found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that trained values mean the same under both configurations."""
    numbers = [name for name, value in here.items() if isinstance(value, bool | int | float)]
    for name in ("peft_type", *numbers):
        value = getattr(here[name], "value", here[name])
        there = found.get(name, value)
        if name not in WITHOUT_EFFECT and there != value:
            raise DroppeftError(
                f"{name} is {there} there, and {value} in this run; set adapter to the same values"
            )
