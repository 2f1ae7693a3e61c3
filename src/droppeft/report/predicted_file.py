"""Predict the classes of a file's rows, write them, and print what was predicted. Ours."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from droppeft.data.labels import indices_of
from droppeft.data.new_texts import NewTexts, read_new_texts
from droppeft.errors import DroppeftError
from droppeft.files import write_atomically
from droppeft.quantities import counted, percent, share
from droppeft.report.progress import bar
from droppeft.report.screen import Screen
from droppeft.runs.trained_columns import trained_columns

if TYPE_CHECKING:
    from droppeft.runs.predicting import Predictor, Probabilities

PREDICTED, PROBABILITY = "predicted", "probability"
SHOWN = 5  # rows
CLASSES_SHOWN = 20
FEWEST_ALIKE = 10  # rows of one class that are remarkable
NARROWEST = 10  # characters of a text on the screen


def predict_file(
    run: Path,
    file: Path,
    out: Path | None,
    round: int | None = None,
    client: int | None = None,
    text: Sequence[str] = (),
    all_probabilities: bool = False,
) -> None:
    """Predict the class of each row of a file, write all at once, and print a summary.

    Args:
        run: folder of the run.
        file: has a column of texts, or two for a model of pairs of texts.
        out: new .csv, .jsonl or .parquet file with the columns of ``file``, the predicted class and
            its probability; ``FILE-predicted.csv`` beside ``file`` if ``None``.
        round, client: as in :func:`~droppeft.runs.predicting.load_predictor`.
        text: names of the columns of texts, if they have other names than in the run.
        all_probabilities: also write a column with the probability of each class.

    Raises:
        DroppeftError: the new file exists already or cannot be written, the texts cannot be read,
            or as :func:`~droppeft.runs.predicting.load_predictor`.
    """
    out = out or file.with_name(f"{file.name.partition('.')[0]}-{PREDICTED}.csv")
    trained = trained_columns(run)
    _check_out(out)
    new = read_new_texts(file, text, trained.label, trained=trained.text)
    console = Console(stderr=True)
    WRITERS[out.suffix](new.rows.slice(0, 1))  # refuses columns that the format cannot hold
    with Screen(console) as screen:
        screen.preparing("loading PyTorch and transformers")
        from droppeft.runs.predicting import load_predictor

        predictor = load_predictor(run, screen.preparing, round, client)
    names = _added_columns(new, predictor.label_names if all_probabilities else ())
    probabilities = _predicted(predictor, new, console)
    table = _with_predictions(new, names, probabilities, predictor.label_names)
    try:
        write_atomically(out, WRITERS[out.suffix](table))
    except OSError as error:
        raise DroppeftError(
            f"{out}: cannot be written ({error.strerror}); choose another file with --out"
        ) from None
    _show(new, probabilities, predictor.label_names, file, Console())
    round = predictor.source.round
    model = f"of round {round}" if round else "before training"
    how = ", UTF-8 with commas" if out.suffix == ".csv" else ""
    print(f"{counted(len(new.texts), 'row')}, by the model {model}: {out}{how}")


def _check_out(out: Path) -> None:
    if out.suffix not in WRITERS:
        raise DroppeftError(f"--out {out}: its name must end with one of {', '.join(WRITERS)}")
    if out.exists():
        raise DroppeftError(f"{out}: exists already; choose another file with --out")
    if not out.absolute().parent.is_dir():
        raise DroppeftError(f"{out}: its folder does not exist; make it, or choose another --out")


def _added_columns(new: NewTexts, classes: Sequence[str]) -> list[str]:
    """Return the names of the new columns; those that are in the file already are refused."""
    names = [PREDICTED, PROBABILITY, *(f"{PROBABILITY} of {name}" for name in classes)]
    for name in names:
        if name in new.rows.column_names:
            raise DroppeftError(f"the file has a column {name} already; rename or remove it")
    return names


def _predicted(predictor: "Predictor", new: NewTexts, console: Console) -> "Probabilities":
    """The probabilities of the complete rows."""
    with bar(console) as progress:
        rows = np.flatnonzero(new.complete)
        task = progress.add_task("texts", total=len(rows))
        texts = [new.texts[row] for row in rows]
        pairs = None if new.pairs is None else [new.pairs[row] for row in rows]
        return predictor.probabilities(texts, pairs, lambda done: progress.advance(task, done))


def _with_predictions(
    new: NewTexts, names: Sequence[str], probabilities: "Probabilities", classes: Sequence[str]
) -> pa.Table:
    """Append the new columns, which are empty in rows without a text."""
    best = probabilities.argmax(axis=1)
    columns: list[Any] = [[classes[place] for place in best], probabilities.max(axis=1).round(6)]
    columns += [probabilities[:, place].round(6) for place in range(len(names) - 2)]
    place_of = pa.array(np.cumsum(new.complete) - 1, mask=~new.complete)
    rows = new.rows
    for name, values in zip(names, columns, strict=True):
        rows = rows.append_column(name, pa.array(values).take(place_of))
    return rows


# Files


def _as_csv(table: pa.Table) -> bytes:
    written = io.BytesIO()
    try:
        pyarrow.csv.write_csv(table, written)
    except pa.ArrowInvalid:
        raise DroppeftError(
            "a column holds values that a .csv file cannot, such as lists; write a .jsonl or "
            ".parquet file with --out"
        ) from None
    return written.getvalue()


def _as_json_lines(table: pa.Table) -> bytes:
    rows = (json.dumps(row, ensure_ascii=False, default=str) for row in table.to_pylist())
    return "".join(f"{row}\n" for row in rows).encode()


def _as_parquet(table: pa.Table) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written)
    return written.getvalue()


WRITERS: dict[str, Callable[[pa.Table], bytes]] = {
    ".csv": _as_csv,
    ".jsonl": _as_json_lines,
    ".parquet": _as_parquet,
}
"""By the ending of a file's name, a function that returns the content of the file."""


# Screen


def _show(
    new: NewTexts,
    probabilities: "Probabilities",
    classes: Sequence[str],
    file: Path,
    console: Console,
) -> None:
    best = probabilities.argmax(axis=1)
    if new.instead_of:
        lacking = f"column{'s' if new.instead_of[1:] else ''} {', '.join(new.instead_of)}"
        _print(
            f"text ← {', '.join(new.columns)}, since {file.name} has no {lacking} (--text chooses "
            "another)\n",
            console,
        )
    _show_rows(new, probabilities, classes, console)
    if without := int(np.sum(~new.complete)):
        _print(f"{counted(without, 'row')} {_have(without)} no text and no prediction.\n", console)
    if len(best) >= FEWEST_ALIKE and len({*best.tolist()}) == 1:
        _print(
            f"all {len(best):,} rows are {classes[best[0]]}; the model may have learnt little\n",
            console,
        )
    if new.labels is not None:
        _show_accuracy(new, best, classes, console)


def _print(line: str, console: Console) -> None:
    console.print(Text(line), soft_wrap=True)


def _have(number: int) -> str:
    return "has" if number == 1 else "have"


def _show_rows(
    new: NewTexts, probabilities: "Probabilities", classes: Sequence[str], console: Console
) -> None:
    """Print the first rows; the texts have the width that the predictions leave."""
    rows = np.flatnonzero(new.complete)[:SHOWN]
    names = [classes[place] for place in probabilities[: len(rows)].argmax(axis=1)]
    texts = [new.texts, *([new.pairs] if new.pairs is not None else [])]
    taken = max(map(cell_len, [PREDICTED, *names])) + len(PROBABILITY) + 2 * (len(texts) + 1)
    room = max(NARROWEST, (console.width - taken) // len(texts))
    preview = Table(box=None, pad_edge=False, header_style="dim")
    for name in new.columns:
        preview.add_column(Text(name), overflow="ellipsis", no_wrap=True, max_width=room)
    preview.add_column(PREDICTED, style="green", no_wrap=True)
    preview.add_column(PROBABILITY, justify="right", no_wrap=True)
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        shown = [Text(" ".join(column[row].split())) for column in texts]
        preview.add_row(*shown, Text(name), share(float(probabilities[place].max())))
    _print(f"{len(rows)} of {counted(len(new.texts), 'row')}:", console)
    console.print(preview)
    console.print()


def _show_accuracy(new: NewTexts, best: Any, classes: Sequence[str], console: Console) -> None:
    """Print accuracy, and precision and recall of each class, if the labels are the run's.

    Rows without a text do not count.
    """
    assert new.labels is not None
    values = [new.labels[row] for row in np.flatnonzero(new.complete)]
    index = indices_of(values, classes)
    given = np.array([bool(label) for label in values])
    unknown = sorted({label for label in values if label and label not in index})
    if unknown or not given.any():
        reason = f"{unknown[0]!r} is not a class of the run" if unknown else "it is empty"
        console.print(f"No accuracy from the column {new.label_column}: {reason}.\n")
        return
    labels = np.array([classes[index[label]] for label in values if label])
    predicted = np.array(classes)[best][given]
    right = predicted == labels
    console.print(
        f"accuracy {percent(float(right.mean()))} on the {counted(len(labels), 'row')} with a "
        f"label in the column {new.label_column}"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("class")
    for name in ("rows", "predicted", "precision", "recall"):
        table.add_column(name, justify="right")
    for name in classes[:CLASSES_SHOWN]:
        of_class, found = labels == name, predicted == name
        precision = float(right[found].mean()) if found.any() else None
        recall = float(right[of_class].mean()) if of_class.any() else None
        counts = (f"{of_class.sum():,}", f"{found.sum():,}")
        table.add_row(Text(name), *counts, share(precision), share(recall))
    console.print(table)
    if len(classes) > CLASSES_SHOWN:
        console.print(f"and {len(classes) - CLASSES_SHOWN} more classes")
    console.print()
