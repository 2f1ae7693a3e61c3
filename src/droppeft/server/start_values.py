"""Begin a run with the values of an existing adapter: the setting ``start_from``.

Ours. The adapter is that of a run's folder, or a folder in PEFT's format.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from droppeft.adapters.by_layer import get_tensors
from droppeft.client.client_model import ClientModel
from droppeft.client.run_inputs import Loaded
from droppeft.errors import DroppeftError
from droppeft.messages import AdapterSpec, ServerState, Tensors, flatten
from droppeft.methods import Method, Setup
from droppeft.runs.export import saved_model
from droppeft.runs.folder import CONFIG

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

WITHOUT_EFFECT = ("r", "inference_mode", "lora_dropout")
"""Numbers in PEFT's configuration that need not agree: shapes show the rank, and the others do not
change what trained values mean."""


def with_start_values(
    folder: str, loaded: Loaded, method: Method, setup: Setup, state: ServerState
) -> ServerState:
    """Return a method's first state with the values of the adapter in a folder.

    Args:
        folder: of a run, whose delivered model is taken, or of an adapter in PEFT's format.
        loaded: data and model of the new run.
        method: of the new run.
        setup: of the new run.
        state: the state before round 1.

    Raises:
        DroppeftError: the folder holds neither, the adapter does not fit the new run, or the method
            would not use its values.
    """
    path = Path(folder)
    if (path / CONFIG).is_file():
        tensors = _of_run(path, loaded, state.model.adapter)
    elif (path / PEFT_CONFIG).is_file():
        tensors = _of_peft_folder(path, loaded.model, state.model.adapter)
    else:
        raise DroppeftError(
            f"start_from={folder}: holds neither a run ({CONFIG}) nor an adapter of PEFT "
            f"({PEFT_CONFIG}); name another folder"
        )
    started = replace(state, model=replace(state.model, tensors=tensors))
    _check_sent(method, setup, started)
    return started


def _of_run(path: Path, loaded: Loaded, adapter: AdapterSpec) -> Tensors:
    _, checkpoint = saved_model(path, None, None)
    model, facts = checkpoint.state.model, checkpoint.facts
    where = f"start_from={path}"
    if facts["model_hash"] != loaded.backbone.weights_hash:
        raise DroppeftError(f"{where}: that run has another model; use the same one")
    _check_names(where, facts["label_names"], loaded)
    if model.base_delta is not None:
        raise DroppeftError(
            f"{where}: that run changed weights of the model itself; export it with --merge and "
            "use the exported folder as model"
        )
    if replace(model.adapter, dropout=None) != replace(adapter, dropout=None):
        raise DroppeftError(
            f"{where}: that run has another adapter; give this one the same settings of adapter "
            "and frozen.layers, which are in its config.toml"
        )
    return model.tensors


def _of_peft_folder(path: Path, client_model: ClientModel, adapter: AdapterSpec) -> Tensors:
    where = f"start_from={path}"
    client_model.attach(adapter)
    model: Any = client_model.model
    if not isinstance(model, PeftModel):
        raise DroppeftError(f"{where}: an adapter of this type is no PEFT adapter; name a run")
    try:
        config = json.loads((path / PEFT_CONFIG).read_text(encoding="utf-8"))
        weights = load_file(path / PEFT_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DroppeftError(f"{where}: cannot be read ({error})") from None
    _check_same_settings(where, config, model.active_peft_config.to_dict())
    fresh = client_model.fresh_tensors(adapter)
    try:
        found = set_peft_model_state_dict(model, weights)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DroppeftError(f"{where}: does not fit this run's adapter: {reason}") from None
    trained = {name for _, name, _ in flatten(fresh)}
    missing = sorted(trained.intersection(found.missing_keys))
    for name in (*missing, *found.unexpected_keys):
        what = "lacks" if name in missing else "has also"
        raise DroppeftError(
            f"{where}: {what} {name}, unlike this run's adapter; use the same adapter.type, "
            "adapter.targets and frozen.layers"
        )
    return get_tensors(client_model.parameters)


def _check_same_settings(where: str, found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that trained values mean the same under both of PEFT's configurations."""
    names = [name for name, value in here.items() if isinstance(value, bool | int | float)]
    for name in ("peft_type", *names):
        there, value = found.get(name, here[name]), here[name]
        if name not in WITHOUT_EFFECT and there != getattr(value, "value", value):
            raise DroppeftError(
                f"{where}: {name} is {there} there, and {getattr(value, 'value', value)} in this "
                "run; set adapter to the same values"
            )


def _check_names(where: str, names: list[str], loaded: Loaded) -> None:
    here = list(loaded.data.label_names)
    if not loaded.task.generates and names != here:
        raise DroppeftError(
            f"{where}: was trained for the classes {', '.join(names)}, and the data have "
            f"{', '.join(here)}; use data with the same classes"
        )


def _check_sent(method: Method, setup: Setup, state: ServerState) -> None:
    """Check that clients get the values; some methods compute a part of them from the seed."""
    instruction = method.instruct(setup, state, 1, [0])[0]
    sent = {name for _, name, _ in flatten(instruction.tensors)}
    for name in sorted(setup.layout(instruction.adapter).keys() - sent):
        raise DroppeftError(
            f"start_from: with method={method.name} clients compute {name} from the seed and "
            "would ignore other values; use another method"
        )
