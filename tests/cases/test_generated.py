"""Generated tables and models, from a file to a model that transformers loads."""

import contextlib
import csv
import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from droppeft.config import load_config
from droppeft.models.packaged import builtin_model_folder
from droppeft.models.quiet import quiet
from droppeft.runs.export import export_run, load_source, saved_model
from droppeft.runs.folder import read_result
from droppeft.runs.model_files import attach_model
from droppeft.server.run import start_run
from refusals import or_refused
from runs import Recorder
from tiny import FAMILIES

SETTINGS = (
    "training.precision=fp32",  # so that its model can be compared outside of autocast
    *("method=fedlora", "clients=2", "cohort_size=2", "rounds=1", "partition.kind=iid"),
    *("partition.min_rows=3", "training.local_steps=1", "training.batch_size=4"),
    *("training.max_length=24", "training.learning_rate=0.05", "training.head_learning_rate=0.05"),
    *("adapter.rank=2", "threads=1", "accelerator=cpu", "evaluation.rows=8"),
)
ODD = "aB9 ,;\"'\n\t\\é漢😀\u200b\u0301ﬁ[#{%$<|_-"

WORDS = ["NA", "nan", "None", "null", "true", "0", "1", "01", "1.0", "-1", "1e5", "LABEL_1"]
"""Labels that readers of tables like to take for something else."""

MISSING = {"NA", "nan", "None", "null", "-1"}
"""Labels that say that there is none."""

characters = st.sampled_from(ODD) | st.characters(
    exclude_categories=["Cs"], exclude_characters="\0"
)
labels = st.sampled_from(WORDS) | st.text(characters, min_size=1, max_size=8)
texts = st.text(characters, max_size=20)


@dataclass(frozen=True)
class Model:
    """A small model.

    Attributes:
        family: a key of :data:`~tiny.FAMILIES`.
        layers: number of its layers.
        width: of its hidden states.
        head: what the files have: no head, one for the data's classes in another order, or one for
            as many classes without names or with other names.
        padding: the tokenizer's padding token; ``None`` for the end-of-text token.
        seed: of the weights, and of the order of the classes.
    """

    family: str
    layers: int
    width: int
    head: str
    padding: str | None
    seed: int


@dataclass(frozen=True)
class Data:
    """A table.

    Attributes:
        labels: names of the classes.
        texts: some texts, of which rows are made.
        pairs: whether a row has two texts.
        separator: between columns.
        bom: whether the file begins with a byte-order mark.
    """

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    pairs: bool
    separator: str
    bom: bool


models = st.builds(
    Model,
    family=st.sampled_from(sorted(FAMILIES)),
    layers=st.integers(1, 3),
    width=st.sampled_from([8, 16]),
    head=st.sampled_from(["none", "permuted", "unnamed", "other"]),
    padding=st.sampled_from(["[PAD]", "[UNK]", None]),
    seed=st.integers(0, 99),
)
tables = st.builds(
    Data,
    labels=st.lists(labels.map(str.strip).filter(bool), min_size=2, max_size=8, unique=True).map(
        tuple
    ),
    texts=st.lists(texts, min_size=1, max_size=4).map(tuple),
    pairs=st.booleans(),
    separator=st.sampled_from([",", ";", "\t"]),
    bom=st.booleans(),
)


Row = tuple[tuple[str, ...], str]
"""One text, or a pair, and a label."""


def save_model(model: Model, names: tuple[str, ...], folder: Path) -> Any:
    """Save a model with its tokenizer, and return it."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.pad_token = model.padding or tokenizer.eos_token
    config = AutoConfig.for_model(
        model.family,
        vocab_size=len(tokenizer),
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=0,
        initializer_range=0.3,
        **FAMILIES[model.family],
    )
    draw = random.Random(model.seed)
    config.num_labels = len(names)
    if model.head in {"permuted", "other"}:
        shown = draw.sample(names, len(names)) if model.head == "permuted" else names
        shown = [name if model.head == "permuted" else f"other {name}" for name in shown]
        config.id2label = dict(enumerate(shown))
        config.label2id = {name: index for index, name in enumerate(shown)}
    with torch.random.fork_rng():
        torch.manual_seed(model.seed)
        classifier: Any = AutoModelForSequenceClassification.from_config(config)
    (classifier.base_model if model.head == "none" else classifier).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # In a decoder, the token that pads is that of the tokenizer.
    if not hasattr(classifier, "classifier"):
        classifier.config.pad_token_id = tokenizer.pad_token_id
    return classifier.eval()


def save_table(data: Data, folder: Path) -> list[Row]:
    """Write train.csv and test.csv, and return the rows of the test split."""
    classes = len(data.labels)
    head = ("sentence1", "sentence2", "label") if data.pairs else ("text", "label")
    encoding = "utf-8-sig" if data.bom else "utf-8"
    rows = []
    for split, count in (("train", max(12, 3 * classes)), ("test", 2 * classes)):
        rows = []
        for number in range(count):
            text = f"{split} {number} {data.texts[number % len(data.texts)]}"
            rows.append(
                ((text, text[:6]) if data.pairs else (text,), data.labels[number % classes])
            )
        with (folder / f"{split}.csv").open("w", newline="", encoding=encoding) as file:
            writer = csv.writer(file, delimiter=data.separator)
            writer.writerow(head)
            writer.writerows((*texts, label) for texts, label in rows)
    return rows


def check(model: Model, data: Data, folder: Path) -> None:
    """Run a round, export its model in both forms, load them, and compare."""
    (folder / "model").mkdir()
    (folder / "data").mkdir()
    rows = save_table(data, folder / "data")
    trained = save_model(model, data.labels, folder / "model")
    settings = [f"model={folder / 'model'}", f"data={folder / 'data'}", *SETTINGS]
    with or_refused("label is (missing|-1, a hidden label)" if MISSING & {*data.labels} else "^$"):
        start_run(load_config(None, settings), folder / "run", Recorder())
        compare(trained, model.head == "permuted", folder / "run", rows)


def compare(trained: Any, has_these_classes: bool, run: Path, rows: list[Row]) -> None:
    """Compare the model of a run with what transformers loads.

    Args:
        trained: the model before the run.
        has_these_classes: whether its head has the classes of the data.
        run: folder of the run.
        rows: of the test split.
    """
    result = read_result(run)
    config, checkpoint = saved_model(run, None, None)
    names = tuple(checkpoint.facts["label_names"])
    assert {*names} == {label for _, label in rows}

    source = load_source(run, config, checkpoint, None, False, lambda step: None)
    tokenizer = source.backbone.tokenizer
    tokenizer.model_input_names = [*source.backbone.inputs, "attention_mask"]
    if has_these_classes:
        order = [trained.config.label2id[name] for name in names]
        expected = padded_logits(trained, tokenizer, rows)[:, order]
        assert_equal(padded_logits(source.backbone.model, tokenizer, rows), expected)

    attach_model(source.client_model, source.model)
    expected = padded_logits(source.client_model.model, tokenizer, rows)
    assert accuracy(expected, names, rows) == pytest.approx(result["global_accuracy"])
    for merge in (False, True):
        loaded = run_card(export_run(run, run.parent / f"merged {merge}", merge=merge).folder)
        classify = loaded["classify"]
        assert tuple(classify.model.config.id2label.values()) == names
        assert_equal(padded_logits(classify.model, classify.tokenizer, rows), expected)
        said = [answer["label"] for answer in classify(as_pipeline_takes_them(rows), batch_size=4)]
        assert said == [names[index] for index in expected.argmax(dim=-1).tolist()]


def as_pipeline_takes_them(rows: list[Row]) -> list[dict[str, str]]:
    return [dict(zip(("text", "text_pair"), texts, strict=False)) for texts, _ in rows]


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def padded_logits(model: Any, tokenizer: Any, rows: list[Row]) -> torch.Tensor:
    """Logits of all rows in one batch, shape (rows, classes)."""
    columns = zip(*(texts for texts, _ in rows), strict=True)
    inputs = tokenizer(
        *map(list, columns), padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


def accuracy(logits: torch.Tensor, names: tuple[str, ...], rows: list[Row]) -> float:
    chosen = [names[index] for index in logits.argmax(dim=-1).tolist()]
    return sum(name == label for name, (_, label) in zip(chosen, rows, strict=True)) / len(rows)


def run_card(folder: Path) -> dict[str, Any]:
    """Run the code of a model card in the folder that it names."""
    match = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert match
    loaded: dict[str, Any] = {}
    with contextlib.chdir(folder), quiet(), contextlib.redirect_stdout(None):
        exec(match[1], loaded)
    return loaded


def run_example(model: Model, data: Data) -> None:
    with tempfile.TemporaryDirectory() as folder, quiet():
        check(model, data, Path(folder))


@settings(max_examples=4, derandomize=True, suppress_health_check=list(HealthCheck))
@given(models, tables)
def test_a_sample_of_tables_and_models(model: Model, data: Data) -> None:
    run_example(model, data)


@pytest.mark.full
@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(models, tables)
def test_tables_and_models(model: Model, data: Data) -> None:
    run_example(model, data)
