"""Export the model of a checkpoint as an adapter or as a merged model; ours.

The run's folder is only read, so a run may be exported while another process works on it. Data are
not loaded, because a checkpoint has the names of the classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from droppeft import seeds
from droppeft.client.client_model import ClientModel
from droppeft.client.client_state import client_folder, load_tensors
from droppeft.client.run_inputs import Say
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.messages.server_state import GlobalModel
from droppeft.messages.tensors import Tensors
from droppeft.methods import Setup, method_named
from droppeft.models.sources import find_source
from droppeft.refusals import Refused
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.folder import RESULT, ROUNDS, check_same_settings, read_result, saved_config
from droppeft.runs.model_cards import Source, adapter_lines, merged_lines
from droppeft.runs.model_files import check_alone, save_adapter, save_merged
from droppeft.runs.read_ledger import read_rows
from droppeft.tasks.metrics import Metric
from droppeft.tasks.registry import task_named


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: the new folder.
        round: after which the model was saved; 0 before the first.
        metric: label of the task's primary metric.
        value: of it, recorded after that round; ``None`` if there was no evaluation.
        rows: number of test texts of that evaluation.
        lines: Python code that loads the model.
    """

    folder: Path
    round: int
    metric: str
    value: float | None
    rows: int
    lines: str


def export_run(
    run: Path,
    out: Path | None = None,
    round: int | None = None,
    merge: bool = False,
    say: Say = lambda step: None,
    client: int | None = None,
) -> Exported:
    """Write the model of a checkpoint to a new folder, in one step.

    Args:
        run: folder of a run, which may be finished, stopped, or running in another process.
        out: the new folder; by default ``adapter-round-N`` or ``merged-round-N`` in the run's
            folder.
        round: of the checkpoint; by default the one that a finished run delivers, or else the
            newest.
        merge: whether to write a plain transformers model with its tokenizer in place of an
            adapter. It has full precision, also after a quantised run.
        say: called with each step, to show progress.
        client: exports this client's model, as at the start of its next local training, in place
            of the global one. Its client state must be on this machine.

    Raises:
        DroppeftError: there is no such run, round or client, the new folder exists, the backbone
            has changed, or the model cannot be written in this form. Nothing has been written then.
    """
    run = run.resolve()
    config, checkpoint = saved_model(run, round, client)
    kind = "merged" if merge else "adapter"
    suffix = "" if client is None else f"-client-{client}"
    out = (out or run / f"{kind}{suffix}-round-{checkpoint.round}").resolve()
    if out.exists():
        raise DroppeftError(f"{out}: exists already; choose another folder")
    if not merge:
        check_alone(checkpoint.state.model)
    source = load_source(run, config, checkpoint, client, merge, say)
    say("writing")
    save, lines = (save_merged, merged_lines) if merge else (save_adapter, adapter_lines)
    save(source, out)
    label = source.task.metrics[0].label
    return Exported(out, source.round, label, source.value, source.rows, lines(source, str(out)))


def saved_model(run: Path, round: int | None, client: int | None) -> tuple[Config, Checkpoint]:
    """Return the configuration of a run and the checkpoint that has a model.

    Args:
        run: folder of a run.
        round: of the checkpoint; ``None`` for the one that a finished run delivers, or else for
            the newest.
        client: whose model is wanted; ``None`` for the global one.

    Raises:
        DroppeftError: there is no such run, round, client or global model, or the settings in the
            folder are not those of the run.
    """
    config = saved_config(run)
    if client is None and not method_named(config.method).has_global_model(config):
        raise DroppeftError(
            f"{run}: method={config.method} has no global model with these settings; name a client"
        )
    if client is not None and not 0 <= client < config.clients:
        raise DroppeftError(
            f"{run}: has no client {client}; its clients are 0 to {config.clients - 1}"
        )
    memory_type = method_named(config.method).memory_type
    if round is None:
        round = _delivered_round(run, client)
    check_facts = partial(check_same_settings, run, config)
    if round is None:
        return config, checkpoints.load_newest(run / "checkpoints", memory_type, check_facts)
    return config, checkpoints.load_round(run / "checkpoints", round, memory_type, check_facts)


def load_source(
    run: Path,
    config: Config,
    checkpoint: Checkpoint,
    client: int | None,
    merge: bool,
    say: Say,
    accelerator: str = "cpu",
) -> Source:
    """Load the model of a checkpoint, as :func:`saved_model` returns it.

    Args:
        run: folder of the run.
        client: whose model is loaded; ``None`` for the global one.
        merge: whether quantised weights are replaced by their values in full precision.
        say: called with each step, to show progress.
        accelerator: the torch device that the model is moved to.

    Raises:
        DroppeftError: the backbone has changed, or the client's state is not on this machine.
    """
    source = _source(run, config, checkpoint, merge, say, accelerator)
    return source if client is None else _for_client(run, source, checkpoint, client)


def _delivered_round(run: Path, client: int | None) -> int | None:
    """Return the round of the model that a finished run delivers; ``None`` if it is not finished.

    The models of clients that keep layers of their own are those of the last round.
    """
    if not (run / RESULT).exists():
        return None
    result = read_result(run)
    round: int | None = result["delivered_round" if client is None else "personalised_round"]
    return round


def _source(
    run: Path, config: Config, checkpoint: Checkpoint, merge: bool, say: Say, accelerator: str
) -> Source:
    """Load the run's backbone.

    For merging, weights that are quantised or in half precision get their values in fp32: the
    adapter was trained on these values, and adding it to the codes would be inexact.
    """
    facts = checkpoint.facts
    names = tuple(facts["label_names"])
    torch.set_num_threads(config.threads)
    find_source(config.model).convert(say)
    say("loading model")
    seed = seeds.seed_for(config.seed, purpose="head")
    exact = merge and (config.quantization, config.training.precision) != ("none", "fp32")
    task = task_named(config.task)
    backbone = task.load_backbone(config, names, seed, dequantised=exact)
    if backbone.weights_hash != facts["model_hash"]:
        raise DroppeftError(
            f"{run}: the model {config.model} has changed since this run started "
            f"({facts['model_hash']}, now {backbone.weights_hash}); restore it"
        )
    value, rows = _recorded(run, checkpoint.round, facts, task.metrics[0])
    return Source(
        config=config,
        backbone=backbone,
        client_model=ClientModel(backbone, task, accelerator, config.seed),
        task=task,
        label_names=names,
        data_hash=facts["data_hash"],
        model=checkpoint.state.model,
        round=checkpoint.round,
        value=value,
        rows=rows,
    )


def _for_client(run: Path, source: Source, checkpoint: Checkpoint, client: int) -> Source:
    """Replace the global model by the one with which a client would start its next training."""
    client_model, config, state = source.client_model, source.config, checkpoint.state
    setup = Setup(
        config,
        source.backbone.num_layers,
        client_model.fresh_tensors,
        client_model.layout,
        clock=None,
        run=checkpoint.facts["run"],
    )
    evaluate_client = method_named(config.method).evaluate_client
    instruction = evaluate_client(setup, state, checkpoint.round + 1, client)
    saved: Tensors = {}
    try:
        if instruction.state_round is not None:
            saved = load_tensors(client_folder(instruction.run, client), instruction.state_round)
    except Refused as error:
        raise DroppeftError(
            f"{run}: client {client} has no model here: {error}, or is on another machine "
            f"({client_folder(instruction.run, client)})"
        ) from None
    tensors = {
        key: {**saved.get(key, {}), **instruction.tensors.get(key, {})}
        for key in dict.fromkeys((*instruction.tensors, *saved))
    }
    measured = _personalised(run, checkpoint.round)
    recorded = next((each for each in measured if each["client"] == client), None)
    return replace(
        source,
        model=GlobalModel(instruction.adapter, tensors, instruction.base_delta),
        client=client,
        value=recorded[source.task.metrics[0].name] if recorded else None,
        rows=recorded["rows"] if recorded else 0,
    )


def _personalised(run: Path, round: int) -> Sequence[Mapping[str, Any]]:
    """Return the evaluations of clients' models after a round, if a finished run has them."""
    if not (run / RESULT).exists():
        return ()
    result = read_result(run)
    measured: Sequence[Mapping[str, Any]] = result["personalised"]
    return measured if result["personalised_round"] == round else ()


def _recorded(
    run: Path, round: int, facts: Mapping[str, Any], metric: Metric
) -> tuple[float | None, int]:
    """Return the quality that the run recorded for a round, and its number of test texts."""
    if (run / RESULT).exists() and (result := read_result(run))["delivered_round"] == round:
        return result[metric.key("global")], result["test_rows"]
    if round == 0:
        return facts["initial"][metric.name], facts["sampled_test_rows"]
    rows = [row for row in read_rows(run / ROUNDS) if row["round"] == round]
    return (rows[-1][metric.key("global")] if rows else None), facts["sampled_test_rows"]
