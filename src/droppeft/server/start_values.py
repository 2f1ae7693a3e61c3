"""Begin a run with the values of an existing adapter: the setting ``start_from``.

Ours. The adapter is that of a run's folder, or a folder in PEFT's format.
"""

from dataclasses import replace
from pathlib import Path

from droppeft.adapters.by_layer import get_tensors
from droppeft.adapters.peft_values import load_peft_values
from droppeft.client.client_model import ClientModel
from droppeft.client.run_inputs import Loaded
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import AdapterSpec
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import Tensors, flatten
from droppeft.methods import Method, Setup
from droppeft.models.model_folders import PEFT_CONFIG
from droppeft.runs.export import saved_model
from droppeft.runs.folder import CONFIG


def with_start_values(
    folder: str, loaded: Loaded, method: Method, setup: Setup, state: ServerState
) -> ServerState:
    """Return a method's first state with the values of the adapter in a folder.

    Args:
        folder: of a run, whose delivered model is taken, or of an adapter in PEFT's format; it has
            passed :func:`check_start`.
        loaded: data and model of the new run.
        method: of the new run.
        setup: of the new run.
        state: the state before round 1.

    Raises:
        DroppeftError: the folder cannot be read, the adapter does not fit the new run, or the
            method would not use its values.
    """
    path = Path(folder)
    if state.alternatives:
        raise DroppeftError(
            f"start_from: method={method.name} begins with several models, which one adapter "
            "cannot start; use another method"
        )
    if (path / CONFIG).is_file():
        tensors = _of_run(path, loaded, state.model.adapter)
    else:
        tensors = _of_peft_folder(path, loaded.model, state.model.adapter)
    started = replace(state, model=replace(state.model, tensors=tensors))
    _check_sent(method, setup, started)
    return started


def check_start(folder: str) -> None:
    """Check that a folder holds a run or an adapter of PEFT.

    Raises:
        DroppeftError: it holds neither.
    """
    if not any((Path(folder) / name).is_file() for name in (CONFIG, PEFT_CONFIG)):
        raise DroppeftError(
            f"start_from={folder}: holds neither a run ({CONFIG}) nor an adapter of PEFT "
            f"({PEFT_CONFIG}); name another folder"
        )


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
    client_model.attach(adapter)
    trained = {name for _, name, _ in flatten(client_model.fresh_tensors(adapter))}
    try:
        load_peft_values(client_model.model, path, trained)
    except DroppeftError as error:
        raise DroppeftError(f"start_from={path}: {error}") from None
    return get_tensors(client_model.parameters)


def _check_names(where: str, names: list[str], loaded: Loaded) -> None:
    here = list(loaded.data.label_names)
    if loaded.task.generates or names == here:
        return
    lacking = [name for name in names if name not in here]
    new = [name for name in here if name not in names]
    difference = [
        f"{what} {', '.join(some)}"
        for what, some in (("have no row of", lacking), ("have also", new))
        if some
    ]
    how = " and ".join(difference) or "have them in another order"
    raise DroppeftError(
        f"{where}: was trained for other classes: the data {how}; use data with the same classes"
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
