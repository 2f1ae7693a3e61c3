"""The result of a run in Python, and its model: quality, rounds, predictions, exports. Ours."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from droppeft.data.conversation_shapes import BadRow, messages_of
from droppeft.data.conversations import Message
from droppeft.errors import DroppeftError
from droppeft.quantities import counted
from droppeft.report.closing import shortened
from droppeft.report.history_figure import history_figure
from droppeft.report.result_html import result_html
from droppeft.runs.answering import Answering, loaded_model
from droppeft.runs.export import export_run
from droppeft.runs.folder import ROUNDS, read_result
from droppeft.runs.ledger import RoundRow
from droppeft.runs.predicting import Predictor, load_predictor
from droppeft.runs.read_ledger import read_rounds, read_rows
from droppeft.runs.trained_columns import trained_columns
from droppeft.tasks.generation import GenerationSettings
from droppeft.tasks.metrics import metrics_in, primary_metric

_BUSY = threading.Lock()
"""Training uses torch's global random generator, so that a process does one run at a time."""

Text = str | tuple[str, str]


@contextmanager
def one_at_a_time() -> Iterator[None]:
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
        with one_at_a_time():
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
        with one_at_a_time():
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
        with one_at_a_time():
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
        return read_rounds(self.folder / ROUNDS)


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
