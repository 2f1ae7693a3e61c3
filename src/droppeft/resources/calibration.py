"""Measure what each layer of a model is worth on a user's data, outside of a run. Ours."""

import torch

from droppeft.client.run_inputs import Loaded, Say, load_model, read_data, tokens_of
from droppeft.config import Config, available_cores
from droppeft.data.partition import calibration_rows
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec, local_training
from droppeft.layer_dropout import Calibration
from droppeft.models.hardware import resolve_here
from droppeft.tasks.registry import task_named
from droppeft.training.calibrating import Progress


def measure(
    config: Config, rows: int | None, say: Say, progress: Progress
) -> tuple[Config, Calibration]:
    """Load data and model, and measure what each layer is worth, with an adapter in all of them.

    Args:
        config: of a run that has training rows.
        rows: number of training rows, which are chosen at random; ``None`` for as many as the task
            wants, or all if there are fewer.
        say: called with what is being done before.
        progress: called with the number of passes through the model, and that of all.

    Returns:
        The resolved configuration, and what was measured.

    Raises:
        DroppeftError: data or model cannot be read, or there are not so many training rows.
    """
    config = resolve_here(config)
    torch.set_num_threads(available_cores())
    say("reading data")
    data = read_data(config).corpus
    known = len(data.train)
    if rows is not None and rows > known:
        raise DroppeftError(f"--rows {rows}: {config.data} has {known:,} training rows; lower it")
    config, backbone, model = load_model(config, data.label_names, say)
    task = task_named(config.task)
    loaded = Loaded(config, task, data, (), data.findings, backbone, model)
    chosen = calibration_rows(known, rows or task.calibration_rows, config.seed)
    say("tokenising")
    table = tokens_of(loaded, data.train.take(chosen))
    spec = adapter_spec(config.adapter, model.num_layers)
    say("measuring what each layer is worth")
    return config, model.calibrate(spec, table, local_training(config), progress)
