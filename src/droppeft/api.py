"""Droppeft in Python: start, load and resume runs, and use their models. Ours.

``droppeft.run(data="news.csv", rounds=20)`` is ``droppeft run data=news.csv rounds=20``.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pandas as pd
import torch

from droppeft.config import build_config, config_with_task
from droppeft.config.other_words import KEYS
from droppeft.config.schema import DEFAULT_METHOD
from droppeft.data.conversation_shapes import BadRow, messages_of
from droppeft.data.conversations import Message
from droppeft.data.in_memory import in_words_of_python, is_in_memory, number_of_clients, write_data
from droppeft.errors import DroppeftError, Interrupted
from droppeft.federated_method import Method
from droppeft.methods import register
from droppeft.methods.rules import check_settings
from droppeft.models.in_memory import save_model
from droppeft.quantities import counted
from droppeft.report.closing import shortened
from droppeft.report.history_figure import history_figure
from droppeft.report.result_html import result_html
from droppeft.report.screen import Screen
from droppeft.runs.answering import Answering, loaded_model
from droppeft.runs.callbacks import Callbacks
from droppeft.runs.export import export_run
from droppeft.runs.folder import (
    CONFIG,
    RESULT,
    ROUNDS,
    check_free,
    new_folder,
    read_result,
)
from droppeft.runs.ledger import RoundRow, read_rows
from droppeft.runs.listener import Listener
from droppeft.runs.predicting import Predictor, load_predictor, trained_columns
from droppeft.server.run import resume_run, start_run
from droppeft.tasks.generation import GenerationSettings
from droppeft.tasks.metrics import metrics_in, primary_metric

__all__ = ["Model", "Result", "Settings", "load", "register", "resume", "run"]

DATA, MODELS = "droppeft-data", "droppeft-models"
"""Folders beside those of runs, for rows and models that were in memory."""

_BUSY = threading.Lock()
"""Training uses torch's global random generator, so that a process does one run at a time."""

Table = Mapping[str, Any]
Text = str | tuple[str, str]


class Settings(TypedDict, total=False):
    """The settings of a run besides data, model and method, as in a TOML file.

    docs/reference/settings.md describes them. A table is a mapping:
    ``training={"learning_rate": 3e-3}``.
    """

    task: str
    transport: str
    quantization: str
    dtype: str
    seed: int
    rounds: int
    clients: int
    cohort_size: int
    quorum: int
    start_from: "str | Path | Result"
    threads: int
    accelerator: str
    tracker: str
    target: float
    source: Table
    partition: Table
    adapter: Table
    dropout: Table
    training: Table
    ditto: Table
    frozen: Table
    evaluation: Table
    configurator: Table
    sharing: Table
    server: Table
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
) -> "Result":
    """Fine-tune a model across simulated clients, and return the result.

    Args:
        data: what to learn from, one of:

            - a file, a folder, an id of the Hugging Face Hub, or ``"builtin"``;
            - a pandas DataFrame, or a list of rows as dicts;
            - a ``Dataset`` or ``DatasetDict`` of the datasets library;
            - a list of these, one for each client, or a mapping from clients' names to them.

            Rows in memory are also written to ``droppeft-data`` beside the run's folder, readable
            by you alone, because a resumed run reads them again.
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
) -> "Result":
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


def load(folder: str | Path) -> "Result":
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


@dataclass(frozen=True)
class _Loaded:
    """The models of a folder that have been loaded; they are kept for further calls."""

    predictors: dict[int | None, Predictor]
    answering: dict[int | None, Answering]
    open: ExitStack


class Model:
    """The model of a run: the global one, or that of a client.

    Args:
        folder: of the run.
        client: whose model it is; ``None`` for the global one.
    """

    def __init__(self, folder: Path, client: int | None = None) -> None:
        self.folder = folder
        self._client = client
        self._loaded = _Loaded({}, {}, ExitStack())

    def __repr__(self) -> str:
        return f"<droppeft.Model of client {self._client}, {self.folder}>"

    def predict(self, texts: Text | Iterable[Text], *, probabilities: bool = False) -> Any:
        """Return the class of each text.

        Args:
            texts: a text, or several, such as a list or a column of a DataFrame. A pair of texts is
                a tuple.
            probabilities: whether to return a DataFrame with a row for each text and the
                probability of each class in a column.

        Returns:
            The name of the class of a single text, or else a list of names.

        Raises:
            DroppeftError: a text is empty or no text, or the run's model writes texts.
        """
        single = isinstance(texts, str | tuple)
        given: Iterable[Any] = [texts] if single else texts
        if isinstance(texts, pd.DataFrame | Mapping):
            columns = list(trained_columns(self.folder).text) or ["text"]
            if len(columns) > 1:
                given_as = "zip(" + ", ".join(f"data[{name!r}]" for name in columns) + ")"
            else:
                given_as = f"data[{columns[0]!r}]"
            raise DroppeftError(f"predict takes texts, not a table; give {given_as}")
        if not isinstance(given, Iterable):
            raise DroppeftError(f"predict takes a text or a list of texts, not {texts!r}")
        first, second = _texts(list(given), len(trained_columns(self.folder).text))
        with _alone():
            if self._client not in self._loaded.predictors:
                predictor = load_predictor(self.folder, _silent, client=self._client)
                self._loaded.predictors[self._client] = predictor
            predictor = self._loaded.predictors[self._client]
            found = predictor.probabilities(first, second)
        if probabilities:
            return pd.DataFrame(found, columns=list(predictor.label_names))
        names = [predictor.label_names[place] for place in found.argmax(axis=1)]
        return names[0] if single else names

    def generate(
        self,
        prompts: str | Iterable[Any],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        batch_size: int = 8,
    ) -> Any:
        """Return the language model's answer to each prompt.

        Args:
            prompts: a text or a list of messages (dicts with ``role`` and ``content``), or a list
                of texts or of lists of messages.
            max_new_tokens: most tokens of an answer.
            temperature: 0 takes the most probable token; above, tokens are drawn.
            batch_size: number of prompts that are answered at once.

        Returns:
            The answer to a single prompt, or else a list of answers.

        Raises:
            DroppeftError: a prompt is empty, or the run's model classifies.
        """
        several: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        is_conversation = bool(several) and isinstance(several[0], Mapping)
        single = isinstance(prompts, str) or is_conversation
        asked = [_messages(one) for one in ([several] if is_conversation else several)]
        settings = GenerationSettings(max_new_tokens, temperature, batch_size=batch_size)
        with _alone():
            if self._client not in self._loaded.answering:
                loading = loaded_model(self.folder, settings, _silent, client=self._client)
                self._loaded.answering[self._client] = self._loaded.open.enter_context(loading)
            answers = self._loaded.answering[self._client].with_settings(settings).answers(asked)
        return answers[0] if single else answers

    def export(self, path: str | Path, *, merge: bool = False) -> Path:
        """Write the model to a new folder, and return it.

        Args:
            path: the new folder.
            merge: whether to write a whole model of transformers in place of an adapter.

        Raises:
            DroppeftError: the folder exists, or the model cannot be written in this form.
        """
        with _alone():
            return export_run(self.folder, Path(path), merge=merge, client=self._client).folder


class Result(Model):
    """A finished run: its quality, its rounds and its model.

    Args:
        folder: of the run.

    Attributes:
        result: the content of ``result.json``.
        metrics: the global model's value of each metric on the test rows; the values of clients'
            own models and before training begin with ``personalised_`` and ``initial_``.
        history: a row for each round, with the columns of ``rounds.jsonl``.
        clients: a row for each client, with the quality of its own model on its own test rows.
        conclusion: what the run has shown, in sentences.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.result: dict[str, Any] = read_result(folder)

    @property
    def metrics(self) -> dict[str, float]:
        """The quality of the models."""
        values = {
            metric.name: self.result[metric.key("global")] for metric in metrics_in(self.result)
        }
        for whose in ("personalised", "initial"):
            keys = [metric.key(whose) for metric in metrics_in(self.result)]
            values |= {key: self.result[key] for key in keys if key in self.result}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def history(self) -> pd.DataFrame:
        """A row for each round."""
        table = pd.DataFrame(read_rows(self.folder / ROUNDS))
        quality = [name for name in table if str(name).startswith("global_")]
        first = ["round", *quality, "train_loss"]
        lists = [name for name in table if isinstance(table[name].iloc[0], list | dict)]
        rest = [name for name in table if name not in (*first, *lists)]
        return table[[*first, *rest, *lists]]

    @property
    def clients(self) -> pd.DataFrame:
        """A row for each client whose own model was evaluated."""
        return pd.DataFrame(self.result["personalised"])

    @property
    def conclusion(self) -> str:
        """Sentences about quality, trend, failures and cost."""
        return "\n".join(self.result["conclusion"])

    def client(self, number: int) -> Model:
        """Return the model of a client, which is the global one unless clients have their own.

        Raises:
            DroppeftError: there is no such client.
        """
        clients = self.result["clients"]
        if type(number) is not int or not 0 <= number < clients:
            raise DroppeftError(f"there is no client {number!r}; clients are 0 to {clients - 1}")
        return Model(self.folder, number)

    def plot(self) -> Any:
        """Return a matplotlib figure of quality and training loss by round.

        Raises:
            DroppeftError: matplotlib is missing.
        """
        return history_figure(self._rows(), primary_metric(self.result))

    def __repr__(self) -> str:
        metric, result = primary_metric(self.result), self.result
        value = result[metric.key("global")]
        known = value if value is not None else result[metric.key("personalised")]
        whose = "" if value is not None else "personalised "
        return (
            f"<droppeft.Result {result['method']}, {whose}{metric.label} {metric.text(known)} "
            f"after {counted(result['rounds'], 'round')}, {self.folder}>"
        )

    def _repr_html_(self) -> str:
        return result_html(self.result, self._rows(), self.folder)

    def _rows(self) -> list[RoundRow]:
        return [RoundRow.from_columns(row) for row in read_rows(self.folder / ROUNDS)]


@contextmanager
def _alone() -> Iterator[None]:
    """Refuse a second run of the process at the same time, and restore torch's threads at the end.

    Raises:
        DroppeftError: another thread is at work.
    """
    if not _BUSY.acquire(blocking=False):
        raise DroppeftError(
            "another thread of this process is using droppeft; wait for it, or start a process of "
            "its own"
        )
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _BUSY.release()


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
        stack.enter_context(_alone())
        told: list[object] = [listeners]
        if progress:
            told.insert(0, stack.enter_context(Screen(folder=folder, commands=False)))
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


def _texts(given: Sequence[Any], wanted: int) -> tuple[list[str], list[str] | None]:
    """First and second texts; the latter is ``None`` for single texts.

    Args:
        given: texts or pairs.
        wanted: number of texts in a row of the run; 0 if it is not known.
    """
    rows = [[one] if isinstance(one, str) else one for one in given]
    for number, row in enumerate(rows, start=1):
        is_row = isinstance(row, list | tuple) and all(isinstance(text, str) for text in row)
        if not is_row or len(row) not in (1, 2):
            found = shortened(repr(given[number - 1]))
            raise DroppeftError(f"text {number} is {found}; give a text, or a tuple of two texts")
        if not all(text.strip() for text in row):
            raise DroppeftError(f"text {number} is empty; remove it")
        if len(row) != (wanted or len(rows[0])):
            what = "pairs of texts" if (wanted or len(rows[0])) == 2 else "single texts"
            raise DroppeftError(f"text {number}: the model was trained on {what}; give the same")
    pairs = bool(rows) and len(rows[0]) == 2
    return [row[0] for row in rows], [row[1] for row in rows] if pairs else None


def _messages(prompt: Any) -> list[Message]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DroppeftError("a prompt is empty; remove it")
        return [Message("user", prompt)]
    try:
        messages = messages_of(prompt, "the prompt")
    except (BadRow, TypeError) as error:
        raise DroppeftError(f"{error}; give a text or a list of messages") from None
    if not messages or messages[-1].role == "assistant":
        raise DroppeftError("a prompt does not end with a message to answer")
    return messages


def _silent(step: str) -> None:
    """Show nothing."""
