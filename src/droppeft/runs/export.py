"""Export the model of a run folder's checkpoint; the run is only read, whoever works on it; ours.

The backbone is loaded, the texts are not: a checkpoint carries the names of the classes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from droppeft import seeds
from droppeft.client.client_model import ClientModel
from droppeft.client.client_state import StateLost, client_folder, load_tensors
from droppeft.client.run_inputs import Say
from droppeft.config import Config, load_config
from droppeft.data.sources import load_text
from droppeft.errors import DroppeftError
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.model_files import (
    Source,
    adapter_lines,
    check_alone,
    merged_lines,
    save_adapter,
    save_merged,
)
from droppeft.runs.folder import CONFIG, RESULT, ROUNDS
from droppeft.runs.ledger import read_rows
from droppeft.methods import Setup, method_named
from droppeft.models.loading import load_backbone, load_dequantised
from droppeft.messages import GlobalModel


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        round: the last one that is in the model.
        accuracy: recorded at that round, ``None`` if it was not evaluated.
        rows: on how many test texts.
        lines: Python that loads it.
    """

    folder: Path
    round: int
    accuracy: float | None
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
    """Write the model of a checkpoint as a new folder, in one step.

    Args:
        run: folder of a run that is finished, stopped, or going on in another process.
        out: the new folder; by default ``adapter-round-N`` or ``merged-round-N`` in the run's.
        round: of the checkpoint; by default the newest.
        merge: a plain transformers model with its tokenizer, in place of an adapter; in full
            precision, whatever the run's quantisation.
        say: told what is being done, for people.
        client: whose own model, as it would begin its next turn; by default the global one. What
            the client keeps must be on this machine.

    Raises:
        DroppeftError: no such run, round or client, a folder that is taken, a backbone that
            changed, or a model that cannot be written in this form; nothing has been written then.
    """
    run = run.resolve()
    if not (run / CONFIG).is_file():
        raise DroppeftError(f"{run}: holds no run to export (no {CONFIG})")
    config = load_config(run / CONFIG)
    if client is None and not method_named(config.method).has_global_model(config):
        raise DroppeftError(
            f"{run}: method={config.method} has no global model to export with these settings; "
            "export a client's own with --client"
        )
    if client is not None and not 0 <= client < config.clients:
        raise DroppeftError(
            f"{run}: has no client {client}; its clients are 0 to {config.clients - 1}"
        )
    folder = run / "checkpoints"
    checkpoint = _checkpoint(folder, round, method_named(config.method).memory_type)
    kind = "merged" if merge else "adapter"
    whose = "" if client is None else f"-client-{client}"
    out = (out or run / f"{kind}{whose}-round-{checkpoint.round}").resolve()
    if out.exists():
        raise DroppeftError(f"{out}: exists already; choose another folder with --out")
    if not merge:
        check_alone(checkpoint.state.model)
    source = _source(run, config, checkpoint, merge, say)
    if client is not None:
        source = _for_client(run, source, checkpoint, client)
    say("writing")
    save, lines = (save_merged, merged_lines) if merge else (save_adapter, adapter_lines)
    save(source, out)
    return Exported(out, source.round, source.accuracy, source.rows, lines(source, str(out)))


def _checkpoint(folder: Path, round: int | None, memory_type: type) -> Checkpoint:
    if round is None:
        return checkpoints.load_newest(folder, memory_type)
    return checkpoints.load_round(folder, round, memory_type)


def _source(run: Path, config: Config, checkpoint: Checkpoint, merge: bool, say: Say) -> Source:
    """Load the backbone as the run had it, on the CPU: a file has no accelerator.

    To merge, quantised weights are loaded as the values that they stand for, which is what the
    adapter was trained on: there is no adding to codes without losing some of the sum.
    """
    facts = _with_labels(run, config, checkpoint.facts, say)
    names = tuple(facts["label_names"])
    torch.set_num_threads(config.threads)
    say("loading model")
    seed = seeds.seed_for(config.seed, purpose="head")
    exact = merge and config.quantization != "none"
    backbone = (load_dequantised if exact else load_backbone)(
        config.model, names, seed, config.quantization
    )
    if backbone.weights_hash != facts["model_hash"]:
        raise DroppeftError(
            f"{run}: the model {config.model} changed since this run began "
            f"({facts['model_hash']}, now {backbone.weights_hash}); put it back"
        )
    accuracy, rows = _recorded(run, checkpoint.round, facts)
    return Source(
        config=config,
        backbone=backbone,
        client_model=ClientModel(backbone, "cpu", config.seed),
        label_names=names,
        data_hash=facts["data_hash"],
        model=checkpoint.state.model,
        round=checkpoint.round,
        accuracy=accuracy,
        rows=rows,
    )


def _for_client(run: Path, source: Source, checkpoint: Checkpoint, client: int) -> Source:
    """The model with which a client would begin its next turn."""
    client_model, config, state = source.client_model, source.config, checkpoint.state
    name = checkpoint.facts.get("run", "")
    layers = source.backbone.num_layers
    setup = Setup(config, layers, client_model.fresh_tensors, client_model.layout, None, name)
    instruction = method_named(config.method).evaluate_client(setup, state, checkpoint.round + 1, client)
    try:
        kept = {} if instruction.state_round is None else load_tensors(client_folder(instruction.run, client), instruction.state_round)
    except StateLost as error:
        raise DroppeftError(
            f"{run}: client {client} cannot be exported: {error}, or on another machine "
            f"({client_folder(instruction.run, client)})"
        ) from None
    whole = {
        key: {**kept.get(key, {}), **instruction.tensors.get(key, {})}
        for key in dict.fromkeys((*instruction.tensors, *kept))
    }
    measured = (_result(run, checkpoint.round) or {}).get("personalised", [])
    found = [one for one in measured if one["client"] == client]
    return replace(
        source,
        model=GlobalModel(instruction.adapter, whole, instruction.base_delta),
        client=client,
        accuracy=found[0]["accuracy"] if found else None,
        rows=found[0]["rows"] if found else 0,
    )


def _result(run: Path, round: int) -> Mapping[str, Any] | None:
    """What the run noted at its end, if that was this round."""
    if not (run / RESULT).exists():
        return None
    result: dict[str, Any] = json.loads((run / RESULT).read_text(encoding="utf-8"))
    return result if result["rounds"] == round else None


def _with_labels(
    run: Path, config: Config, facts: Mapping[str, Any], say: Say
) -> Mapping[str, Any]:
    """Older checkpoints lack two facts, which then come from the data."""
    if "label_names" in facts:
        return facts
    say("reading data")
    data = load_text(config.data, config.source, config.partition.key)
    if data.content_hash != facts["data_hash"]:
        raise DroppeftError(
            f"{run}: the data {config.data} changed since this run began "
            f"({facts['data_hash']}, now {data.content_hash}); put them back"
        )
    rows = min(len(data.test), config.evaluation.rows)
    return {**facts, "label_names": data.label_names, "sampled_test_rows": rows}


def _recorded(run: Path, round: int, facts: Mapping[str, Any]) -> tuple[float | None, int]:
    """The accuracy that the run noted for a round, and on how many test texts."""
    result = _result(run, round)
    if result is not None:
        return result["global_accuracy"], result["test_rows"]
    if round == 0:
        return facts["initial_accuracy"], facts["sampled_test_rows"]
    noted = [row["global_accuracy"] for row in read_rows(run / ROUNDS) if row["round"] == round]
    return (noted[-1] if noted else None), facts["sampled_test_rows"]
