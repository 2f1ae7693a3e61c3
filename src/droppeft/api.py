"""Droppeft in Python: start, load and resume runs, and use their models. Ours.

``droppeft.run(data="news.csv", rounds=20)`` is ``droppeft run data=news.csv rounds=20``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from droppeft.config import build_config, config_with_task
from droppeft.config.defaults import DEFAULT_METHOD
from droppeft.config.other_words import KEYS
from droppeft.data.in_memory import in_words_of_python, is_in_memory, number_of_clients, write_data
from droppeft.errors import DroppeftError, Interrupted
from droppeft.federated_method import Method
from droppeft.methods import register
from droppeft.methods.rules import check_settings
from droppeft.models.in_memory import save_model
from droppeft.report.page_writer import PageWriter
from droppeft.report.screen import Screen
from droppeft.results import Model, Result, one_at_a_time
from droppeft.runs.callbacks import Callbacks
from droppeft.runs.folder import CONFIG, RESULT, check_free, new_folder
from droppeft.runs.listener import Listener
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run

__all__ = ["Model", "Result", "Settings", "load", "register", "resume", "run"]

DATA, MODELS = "droppeft-data", "droppeft-models"
"""Folders beside those of runs, for rows and models that were in memory."""

Table = Mapping[str, Any]


class Settings(TypedDict, total=False):
    """The settings of a run besides data, model and method, as in a TOML file.

    docs/reference/settings.md describes them. A table is a mapping:
    ``training={"learning_rate": 3e-3}``.
    """

    task: str
    transport: str
    quantization: str
    seed: int
    rounds: int
    clients: int
    cohort_size: int
    quorum: int
    sites: Sequence[str | Path]
    start_from: str | Path | Result
    workers: int
    threads: int
    accelerator: str
    tracker: str
    target: float
    source: Table
    partition: Table
    adapter: Table
    backward: Table
    dropout: Table
    training: Table
    ditto: Table
    frozen: Table
    evaluation: Table
    configurator: Table
    sharing: Table
    server: Table
    traffic: Table
    privacy: Table
    clock: Table
    flower: Table


def run(
    data: Any = "builtin",
    *,
    model: Any = None,
    tokenizer: Any = None,
    method: str | Method = DEFAULT_METHOD,
    test: Any = None,
    out: str | Path | None = None,
    callbacks: Sequence[object] = (),
    progress: bool = True,
    **settings: Unpack[Settings],
) -> Result:
    """Fine-tune a model across simulated clients, and return the result.

    Args:
        data: what to learn from, one of:

            - a file, a folder, an id of the Hugging Face Hub, or ``"builtin"``;
            - a pandas DataFrame, or a list of rows as dicts;
            - a ``Dataset`` or ``DatasetDict`` of the datasets library;
            - a list of these, one for each client, or a mapping from clients' names to them.

            Rows in memory are also written to ``droppeft-data`` beside the run's folder, readable
            by you alone, because a resumed run reads them again. With the setting ``sites``, which
            names node files of clients with rows of their own, it has only rows to test on.
        model: a name, an id of the Hub, a folder, or a loaded model of transformers, which is saved
            in ``droppeft-models`` beside the run's folder; by default the task's default model.
        tokenizer: of a loaded model.
        method: name of a federated method, by default ``adaptive``, or a method of your own.
        test: rows to test on, or a file with them. Without it, a test split of ``data`` is used, or
            a fifth of the rows.
        out: new folder for the run; by default ``runs/TIME-METHOD``.
        callbacks: objects with any of the methods of :class:`~droppeft.runs.listener.Listener`,
            such as ``round_done(row)``. An error that one raises ends the run, whose finished
            rounds are saved.
        progress: whether to print what is done, with progress bars in a terminal.
        settings: all others, as :class:`Settings` lists them. ``start_from`` may be a result.

    Raises:
        DroppeftError: a setting is unknown or has a wrong value (nothing has been loaded then), or
            data or model cannot be read or do not fit.
        KeyboardInterrupt: on Ctrl-C; the message says how to continue.
    """
    name = register(method).name if isinstance(method, Method) else method
    tree: dict[str, Any] = {**settings, "method": name}
    tree |= _start_setting(tree)
    if "sites" in tree:
        tree["sites"] = [str(path) for path in tree["sites"]]
    _check(tree, data, model)
    listeners = Callbacks(callbacks)
    folder = new_folder(name) if out is None else Path(out)
    if (folder / CONFIG).exists():
        raise DroppeftError(
            f"out={folder}: holds a run already; choose another folder, or continue it with "
            f"droppeft.resume({str(folder)!r})"
        )
    check_free(folder)
    tree |= _data_settings(data, test, folder.parent / DATA, tree)
    if model is not None:
        tree["model"] = _model_name(model, tokenizer, folder.parent / MODELS)
    elif tokenizer is not None:
        raise DroppeftError("tokenizer goes with a loaded model; leave it out, or give model=")
    try:
        config = config_with_task(tree)
        check_settings(config)
        return _worked(partial(start_run, config, folder), folder, listeners, progress)
    except DroppeftError as error:
        if is_in_memory(data):
            raise DroppeftError(in_words_of_python(str(error), tree["data"])) from None
        raise


def resume(
    folder: str | Path,
    *,
    rounds: int | None = None,
    callbacks: Sequence[object] = (),
    progress: bool = True,
) -> Result:
    """Continue a run that was stopped, or give a finished one more rounds, and return the result.

    The result of a run that was stopped is the same as without the stop.

    Args:
        folder: of the run. Without ``rounds``, a finished run is returned as it is.
        rounds: new number of rounds of the whole run; ``None`` leaves it.
        callbacks, progress: as in :func:`run`.

    Raises:
        DroppeftError: the folder holds no run, ``rounds`` is not more than it has, or data or model
            have changed.
        KeyboardInterrupt: on Ctrl-C.
    """
    listeners, path = Callbacks(callbacks), Path(folder)
    work = partial(resume_run, path, rounds=rounds)
    return _worked(work, path, listeners, progress)


def load(folder: str | Path) -> Result:
    """Return the result of a finished run.

    Raises:
        DroppeftError: the folder holds no finished run.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise DroppeftError(f"{path}: holds no run (no {CONFIG})")
    if not (path / RESULT).is_file():
        raise DroppeftError(
            f"{path}: the run is not finished; continue it with droppeft.resume({str(path)!r})"
        )
    return Result(path)


def _start_setting(tree: Mapping[str, Any]) -> dict[str, str]:
    """The setting ``start_from`` as a text, if it is given."""
    start = tree.get("start_from")
    if isinstance(start, Model) and not isinstance(start, Result):
        raise DroppeftError(
            "start_from is the model of a client; export it, and give the exported folder"
        )
    if isinstance(start, Result | Path):
        return {"start_from": str(start.folder if isinstance(start, Result) else start)}
    return {}


def _worked(
    work: Callable[[Listener], object], folder: Path, listeners: Callbacks, progress: bool
) -> Result:
    """Do the work of a run in ``folder`` and return its result."""
    with ExitStack() as stack:
        stack.enter_context(one_at_a_time())
        told: list[object] = [PageWriter(folder), listeners]
        if progress:
            told.insert(1, stack.enter_context(Screen(folder=folder, commands=False)))
        try:
            work(Callbacks(told))
        except Interrupted as stop:
            raise KeyboardInterrupt(
                f"stopped after round {stop.round}, which is saved; continue with "
                f"droppeft.resume({str(folder)!r})"
            ) from None
        except DroppeftError:
            raise
        except Exception as error:
            if (folder / CONFIG).is_file():
                error.add_note(
                    f"Finished rounds are saved; continue with droppeft.resume({str(folder)!r})"
                )
            raise
    return load(folder)


def _check(tree: Mapping[str, Any], data: Any, model: Any) -> None:
    """Refuse wrong settings before data and model in memory are written."""
    _check_tables(tree)
    names: dict[str, Any] = {"data": "rows in memory" if is_in_memory(data) else str(data)}
    if model is not None:
        names["model"] = str(model) if isinstance(model, str | Path) else "a loaded model"
    if clients := number_of_clients(data):
        names["clients"] = tree.get("clients", clients)
    build_config({**tree, **names})


def _check_tables(tree: Mapping[str, Any]) -> None:
    """Refuse a setting of a table that is written as in scikit-learn, ``training__lr``."""
    for key in tree:
        table, _, name = key.partition("__")
        if name and Settings.__annotations__.get(table) == Table:
            meant, _, leaf = KEYS.get(name, "").partition(" ")[0].partition(".")
            name = leaf if meant == table else name
            raise DroppeftError(f"{key} is no setting; write {table}={{{name!r}: …}}")


def _data_settings(data: Any, test: Any, folder: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that read the data, which are written first if they are in memory."""
    if not is_in_memory(data) and test is None:
        return {"data": str(data)}
    if not is_in_memory(data):
        if not Path(data).expanduser().is_file():
            raise DroppeftError(
                "test goes with rows in memory or a file; of a folder or a data set of the Hub, "
                "name the test split with source={'test': NAME}"
            )
        data = {"train": data}
    found = write_data(data, test, folder)
    if "clients" not in found:
        return found
    count, given = found["clients"], tree.get("clients")
    if given not in (None, count):
        raise DroppeftError(f"clients={given}, but there are {count} data sets; leave it out")
    partition = dict(tree.get("partition", {}))
    if partition.keys() & {"kind", "key"}:
        raise DroppeftError(
            "partition.kind and partition.key do not apply to one data set for each client; "
            "leave them out"
        )
    found["partition"] |= partition
    return {"cohort_size": min(5, count), **found} | _given(tree, "cohort_size")


def _given(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: tree[key]} if key in tree else {}


def _model_name(model: Any, tokenizer: Any, folder: Path) -> str:
    if not isinstance(model, str | Path):
        return str(save_model(model, tokenizer, folder))
    if tokenizer is not None:
        raise DroppeftError(f"tokenizer goes with a loaded model; model={model} has its own")
    return str(model)
