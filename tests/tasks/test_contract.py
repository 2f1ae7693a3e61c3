"""What every task must do, whatever is learnt. A new task is one more row of ``CASES``."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import TaskType
from torch import nn

from chats import save_chat_model, write_chat_data
from droppeft.config import Config, load_config
from droppeft.data.partition import ClientRows
from droppeft.data.tokens import TokenRows
from droppeft.errors import DroppeftError
from droppeft.models.loading import Backbone
from droppeft.tasks.metrics import LOSS, METRICS
from droppeft.tasks.registry import TASKS, task_named
from droppeft.tasks.task import BoundTask, Corpus, Task, model_inputs, rows_of
from droppeft.training.loop import evaluate
from runs import write_tiny_data
from tiny import save_tiny_model

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """What a task is tested with.

    Attributes:
        write_data: writes a small data set into a folder and returns its path.
        save_model: saves a small model and its tokenizer in a folder and returns its path.
    """

    write_data: Callable[[Path], Path]
    save_model: Callable[[Path], Path]


CASES = {
    "classification": Case(write_tiny_data, save_tiny_model),
    "causal_lm": Case(write_chat_data, save_chat_model),
}


@dataclass(frozen=True)
class Ready:
    """A task with data that were read, a model that was loaded, and tokenised test rows."""

    task: Task
    config: Config
    corpus: Corpus
    backbone: Backbone
    table: Any
    bound: BoundTask

    @property
    def model(self) -> nn.Module:
        """The model in evaluation mode, in which two passes give the same values."""
        return self.backbone.model.eval()


@pytest.fixture(scope="module", params=list(TASKS))
def ready(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    case, task = CASES[request.param], TASKS[request.param]
    data = case.write_data(tmp_path_factory.mktemp("data"))
    model = case.save_model(tmp_path_factory.mktemp("model"))
    config = load_config(
        None, [f"task={task.name}", f"data={data}", f"model={model}", "training.precision=fp32"]
    )
    corpus = task.read(config)
    backbone = task.load_backbone(config, corpus.label_names, seed=0)
    model: Any = backbone.model
    if model.get_output_embeddings() is not None:  # frozen, as beside an adapter
        model.get_output_embeddings().requires_grad_(False)
    table = task.encode(corpus.test, backbone.tokenizer, config)
    bound = task.on(backbone.inputs, int(backbone.tokenizer.pad_token_id), CPU)
    return Ready(task, config, corpus, backbone, table, bound)


def first_rows(number: int) -> np.ndarray[Any, Any]:
    return np.arange(number, dtype=np.int64)


def test_every_task_has_a_row_here() -> None:
    assert CASES.keys() == TASKS.keys()


def test_a_task_is_found_by_its_name() -> None:
    for name, task in TASKS.items():
        assert task_named(name) is task
        assert task.name == name
    with pytest.raises(DroppeftError, match=r"^task=poetry: there is no such task; known are "):
        task_named("poetry")


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_metrics_are_known_and_the_loss_is_one_of_them(task: Task) -> None:
    assert LOSS in task.metrics
    assert len(set(task.metrics)) == len(task.metrics)
    assert all(METRICS[metric.name] == metric for metric in task.metrics)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_peft_knows_the_task(task: Task) -> None:
    assert task.adapter_task in TaskType.__members__


def test_data_have_what_the_partition_and_the_files_need(ready: Ready) -> None:
    corpus = ready.corpus
    for table in (corpus.train, corpus.test):
        assert len(table) == len(table.labels) > 0
        assert set(table.labels) <= set(range(max(1, len(corpus.label_names))))
    assert len(corpus.content_hash) == 16
    assert int(corpus.content_hash, 16) >= 0
    assert ready.task.read(ready.config).content_hash == corpus.content_hash
    assert len(ready.table) == len(corpus.test)


def test_references_are_values_of_the_primary_metric(ready: Ready) -> None:
    rows = np.arange(len(ready.corpus.train), dtype=np.int64)
    clients = [ClientRows(rows[:-10], rows[:0], rows[-10:])]
    metric = ready.task.metrics[0]
    for name, value in ready.task.references(ready.corpus, clients).items():
        assert name.endswith(f"_{metric.name}")
        assert value is None or metric.is_possible(value)


def test_a_configuration_is_that_of_the_loaded_model(ready: Ready) -> None:
    found = ready.task.load_backbone_config(ready.config.model, ready.corpus.label_names)
    loaded: Any = ready.backbone.model.config
    assert type(found.config) is type(loaded)
    assert found.config.num_hidden_layers == ready.backbone.num_layers
    assert isinstance(ready.backbone.model, type(ready.task.auto_class.from_config(found.config)))


def test_a_batch_has_the_chosen_rows_and_runs_through_the_model(ready: Ready) -> None:
    rows = np.array([3, 0, 2], dtype=np.int64)
    batch = ready.bound.collate(ready.table, rows)
    inputs = model_inputs(batch)
    assert rows_of(batch) == 3
    assert set(inputs) <= {*ready.bound.inputs, "attention_mask"}
    assert inputs.keys() < batch.keys()  # the rest is what is learnt
    assert {value.shape for value in inputs.values()} == {batch["input_ids"].shape}
    assert batch["attention_mask"].sum(dim=1).tolist() == ready.table.lengths[rows].tolist()
    assert {value.device for value in batch.values()} == {CPU}
    with torch.inference_mode():
        ready.model(**inputs)


def test_loss_and_evaluation_of_a_batch_agree(ready: Ready) -> None:
    batch = ready.bound.collate(ready.table, first_rows(5))
    loss = ready.bound.loss(ready.model, batch)
    with torch.inference_mode():
        result = ready.bound.evaluate(ready.model, batch)
    assert (loss.dtype, loss.shape, loss.requires_grad) == (torch.float32, (), True)
    assert result.targets == ready.bound.targets(batch)
    assert float(loss.detach()) == pytest.approx(result.loss_sum / result.targets, rel=1e-5)


def test_losses_by_row_are_those_of_the_batch(ready: Ready) -> None:
    batch = ready.bound.collate(ready.table, first_rows(5))
    with torch.inference_mode():
        losses, targets = ready.bound.losses_by_row(ready.model, batch)
        whole = ready.bound.evaluate(ready.model, batch)
        alone = ready.bound.collate(ready.table, first_rows(5)[4:])
        last = ready.bound.evaluate(ready.model, alone)
    assert (losses.shape, targets.shape) == ((5,), (5,))
    assert float(losses.sum()) == pytest.approx(whole.loss_sum, rel=1e-5)
    assert int(targets.sum()) == whole.targets
    assert float(losses[4]) == pytest.approx(last.loss_sum, rel=1e-4)
    assert int(targets[4]) == last.targets


def test_the_number_of_targets_is_what_the_server_accepts(ready: Ready) -> None:
    batch = ready.bound.collate(ready.table, first_rows(5))
    found = ready.bound.targets(batch)
    if ready.task.rows_are_targets:
        assert found == rows_of(batch)
    else:
        assert rows_of(batch) <= found <= batch["input_ids"].numel()


def test_metrics_do_not_depend_on_the_batches(ready: Ready) -> None:
    with torch.inference_mode():
        whole, *parts = (
            ready.bound.evaluate(ready.model, ready.bound.collate(ready.table, rows))
            for rows in (first_rows(12), first_rows(12)[:5], first_rows(12)[5:])
        )
    found = ready.bound.metrics([whole])
    assert found.keys() == {metric.name for metric in ready.task.metrics}
    assert all(METRICS[name].is_possible(value) for name, value in found.items())
    assert found["loss"] == pytest.approx(whole.loss_sum / whole.targets)
    assert ready.bound.metrics(parts) == pytest.approx(found, rel=1e-5)


def test_the_evaluation_loop_gives_the_same_metrics(ready: Ready) -> None:
    rows = first_rows(12)
    found = evaluate(ready.model, ready.table, rows, ready.bound, batch_size=4)
    with torch.inference_mode():
        result = ready.bound.evaluate(ready.model, ready.bound.collate(ready.table, rows))
    assert found.metrics == pytest.approx(ready.bound.metrics([result]), rel=1e-5)
    assert (found.rows, found.loss) == (12, found.metrics["loss"])


def test_a_sample_batch_is_like_one_of_rows(ready: Ready) -> None:
    """Its model inputs have the shapes that were asked for, and it gives a loss to count."""
    real, sample = ready.bound.collate(ready.table, first_rows(3)), ready.bound.sample_batch(3, 8)
    assert sample.keys() == real.keys()
    for name, value in sample.items():
        assert (value.dtype, value.ndim) == (real[name].dtype, real[name].ndim)
    assert {value.shape for value in model_inputs(sample).values()} == {(3, 8)}
    assert ready.bound.targets(sample) > 0
    loss = ready.bound.loss(ready.model, sample)
    assert torch.isfinite(loss.detach())


def test_random_rows_are_learnt_like_real_ones(ready: Ready) -> None:
    """Of tokens alone, for measurements without data."""
    offsets = np.array([0, 5, 12], np.int64)
    columns = {name: np.zeros(12, np.int32) for name in ready.bound.inputs}
    table = ready.task.labelled(TokenRows(columns, offsets), 2, np.random.default_rng(0))
    assert type(table) is type(ready.table)
    batch = ready.bound.collate(table, first_rows(2))
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 7]
    assert ready.bound.targets(batch) >= 2
    assert torch.isfinite(ready.bound.loss(ready.model, batch).detach())


def test_less_loss_is_what_training_leads_to(ready: Ready) -> None:
    """Steps along the gradient of ``loss`` lower the loss that is measured on the same rows."""
    model = copy.deepcopy(ready.model)
    batch = ready.bound.collate(ready.table, first_rows(6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def measured() -> float:
        with torch.inference_mode():
            return ready.bound.metrics([ready.bound.evaluate(model, batch)])["loss"]

    before = measured()
    for _ in range(10):
        ready.bound.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert measured() < 0.9 * before
