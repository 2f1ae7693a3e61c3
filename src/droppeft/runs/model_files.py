"""Write an adapter in PEFT's format, or a merged model that needs transformers alone; ours.

Either has the tokenizer beside it, the names of the classes, and a model card that says how to load
it (:mod:`droppeft.runs.model_cards`).
"""

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from droppeft.adapters.attach import export_adapter, merged
from droppeft.adapters.base_delta import base_delta_applied
from droppeft.client.global_model import attach_model
from droppeft.client.run_inputs import Loaded
from droppeft.errors import DroppeftError
from droppeft.files import sync
from droppeft.messages.server_state import GlobalModel
from droppeft.models.quiet import quiet
from droppeft.runs.model_cards import CLASSES, Source, adapter_card, merged_card
from droppeft.tasks.task import Task
from droppeft.training.loop import Evaluation

PROBE = "The merged model must give the same logits for this sentence as the model with adapters."
MERGE_TOLERANCE = 1e-3
"""Largest difference of a logit after merging, relative to the largest logit.

Merging in float32 changes logits by at most a hundredth of this.
"""


def write_adapter(
    loaded: Loaded, model: GlobalModel, round: int, quality: Evaluation, out: Path
) -> str:
    """Write ``out/adapter``, replacing an existing one, and return the hash of its tensors' file.

    Args:
        loaded: data, split and model of the run.
        model: the global model.
        round: after which it was saved.
        quality: of the model.
        out: folder of the run.

    Raises:
        DroppeftError: the model has a base delta, which PEFT's format cannot hold.
    """
    config, data = loaded.config, loaded.data
    source = Source(
        config=config,
        backbone=loaded.backbone,
        client_model=loaded.model,
        task=loaded.task,
        label_names=data.label_names,
        data_hash=data.content_hash,
        model=model,
        round=round,
        value=quality.metrics[loaded.task.metrics[0].name],
        rows=quality.rows,
    )
    folder, partial = out / "adapter", out / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    _fill_with_adapter(source, partial)
    _make_durable(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    sync(out)
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def save_adapter(source: Source, out: Path) -> None:
    """Write the adapter to the new folder ``out``, in one step.

    Raises:
        DroppeftError: the model has a base delta, or the folder cannot be written.
    """
    with _new_folder(out) as folder:
        _fill_with_adapter(source, folder)


def save_merged(source: Source, out: Path) -> None:
    """Merge the adapter into the backbone and write the plain model to ``out``, in one step.

    The client model cannot be used afterwards.

    Raises:
        DroppeftError: adapters of this type cannot be merged into weights, or the folder cannot be
            written.
    """
    client_model, model, tokenizer = source.client_model, source.model, source.backbone.tokenizer
    attach_model(client_model, model)
    with base_delta_applied(client_model.model, model.base_delta):
        expected = _logits(client_model.model, tokenizer)
        plain: Any = merged(client_model.model)
        with _new_folder(out) as folder, quiet():
            plain.save_pretrained(folder)
            _save_tokenizer(source, folder)
            (folder / "README.md").write_text(merged_card(source), encoding="utf-8")
            _check_logits(source.task, folder, expected)


def check_alone(model: GlobalModel) -> None:
    """Check that a model can be exported as an adapter alone.

    Raises:
        DroppeftError: it has a base delta, which is not part of the adapter.
    """
    if model.base_delta is not None:
        raise DroppeftError(
            "a model with a base delta cannot be exported as an adapter alone; "
            "droppeft export --merge writes it with its backbone"
        )


def _fill_with_adapter(source: Source, folder: Path) -> None:
    check_alone(source.model)
    attach_model(source.client_model, source.model)
    export_adapter(source.client_model.model, folder, adapter_card(source))
    _save_tokenizer(source, folder)
    if not source.task.generates:
        names = json.dumps(source.label_names, ensure_ascii=False, indent=2)
        (folder / CLASSES).write_text(f"{names}\n", encoding="utf-8")


def _save_tokenizer(source: Source, folder: Path) -> None:
    """Write the tokenizer, which truncates texts as in the run if it is asked to truncate.

    It gives the columns that the model took: transformers would use token types in GPT-2, too.
    """
    tokenizer = copy.deepcopy(source.backbone.tokenizer)
    tokenizer.model_input_names = [*source.backbone.inputs, "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # else it is not saved
    if tokenizer.is_fast:  # its file would have the settings of the last call
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    if not source.task.generates:
        tokenizer.model_max_length = source.config.training.max_length
    tokenizer.save_pretrained(folder)


def _check_logits(task: Task, folder: Path, expected: torch.Tensor) -> None:
    """Load the merged model and compare its logits: PEFT cannot merge every type exactly."""
    model = task.auto_class.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    logits = _logits(model, tokenizer)
    if not torch.allclose(
        logits, expected, rtol=0, atol=MERGE_TOLERANCE * float(expected.abs().max())
    ):
        raise DroppeftError(
            "merging this adapter into the backbone changes the model's logits; "
            "export it without --merge"
        )


def _logits(model: nn.Module, tokenizer: Any) -> torch.Tensor:
    with torch.inference_mode():
        output = model.eval()(input_ids=tokenizer(PROBE, return_tensors="pt")["input_ids"])
    logits: torch.Tensor = output.logits
    return logits


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder, which is renamed to ``out`` unless an error is raised."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            inside = Path(scratch) / out.name
            inside.mkdir()
            yield inside
            _make_durable(inside)
            inside.replace(out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DroppeftError(f"{out}: cannot be written ({reason}); choose another folder") from None


def _make_durable(folder: Path) -> None:
    """Sync all files to disk, and give them the folder's permissions.

    safetensors makes its files readable by their owner alone.
    """
    mode = folder.stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode & 0o666)
        sync(path)
    sync(folder)
