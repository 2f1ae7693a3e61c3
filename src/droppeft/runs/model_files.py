"""Write an adapter in PEFT's format, or a merged model that needs transformers alone; ours.

Either has a model card that says how to load it. The card contains nothing from the texts.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from droppeft.adapters.attach import export_adapter, loading_of, merged
from droppeft.adapters.base_delta import base_delta_applied
from droppeft.adapters.by_layer import count_parameters, set_tensors
from droppeft.client.client_model import ClientModel
from droppeft.client.run_inputs import Loaded
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.files import sync
from droppeft.messages import GlobalModel
from droppeft.models.loading import Backbone
from droppeft.models.quantization import settings
from droppeft.models.quiet import quiet
from droppeft.models.sources import PACKAGED
from droppeft.tasks.task import Task
from droppeft.training.loop import Evaluation

PROBE = "The merged model must give the same logits for this sentence as the model with adapters."
MERGE_TOLERANCE = 1e-3
"""Largest difference of a logit after merging, relative to the largest logit.

Merging in float32 changes logits by at most a hundredth of this.
"""


@dataclass(frozen=True)
class Source:
    """A model to export, and what its card says about it.

    Attributes:
        config: of the run, resolved.
        backbone: of the run.
        client_model: the backbone, to which the model's adapter is attached.
        task: what was learnt.
        label_names: in the order of the class indices.
        data_hash: content hash of the run's data.
        model: adapter, tensors and base delta.
        round: after which the model was saved; 0 before the first.
        value: of the task's primary metric, recorded after that round; ``None`` if there was no
            evaluation.
        rows: number of test texts of that evaluation.
        client: whose model it is; ``None`` for the global one.
    """

    config: Config
    backbone: Backbone
    client_model: ClientModel
    task: Task
    label_names: tuple[str, ...]
    data_hash: str
    model: GlobalModel
    round: int
    value: float | None
    rows: int
    client: int | None = None

    @property
    def adapter_type(self) -> str:
        """The type of the adapters."""
        return next(layer.type for layer in self.model.adapter.layers if layer is not None)


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
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(_merged_card(source), encoding="utf-8")
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


def adapter_lines(source: Source, folder: str) -> str:
    """Python code that loads the adapter in ``folder`` as ``model``, and its ``tokenizer``."""
    base, tokenizer = source.backbone.path, source.backbone.tokenizer
    if base.startswith("config:"):
        return (
            f"# The weights of {base} are random and in no file:\n"
            "# droppeft export --merge writes a model that can be loaded.\n"
        )
    padding = (
        'tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"\n'
        "model.config.pad_token_id = tokenizer.pad_token_id\n"
        if tokenizer.pad_token == tokenizer.eos_token
        else ""
    )
    # The folder of a package's model depends on the installation of whoever loads it.
    name = source.config.model
    packaged = name in PACKAGED or name.endswith(".gguf")
    imports = "from droppeft.models.sources import find_source\n" if packaged else ""
    path = f"find_source({name!r}).readable" if packaged else repr(base)
    loading = loading_of(source.adapter_type)
    quantised, options = _quantised_lines(source)
    auto, head, arguments = source.task.auto_class.__name__, "", ""
    if not source.task.generates:
        head = f"id2label = {dict(enumerate(source.label_names))!r}\n"
        arguments = ", id2label=id2label, ignore_mismatched_sizes=True"
    return f"""\
{imports}{loading.import_line}
from transformers import {auto}, AutoTokenizer

base = {path}
{head}{quantised}model = {auto}.from_pretrained(
    base{arguments}{options}
)
model = {loading.function}(model, {folder!r}).eval()
tokenizer = AutoTokenizer.from_pretrained(base)
{padding}{_cut(source)}"""


def merged_lines(source: Source, folder: str) -> str:
    """Python code that loads the merged model in ``folder`` as ``model``, and its ``tokenizer``."""
    auto = source.task.auto_class.__name__
    return f"""\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained({folder!r}).eval()
tokenizer = AutoTokenizer.from_pretrained({folder!r})
{_cut(source)}"""


def _quantised_lines(source: Source) -> tuple[str, str]:
    """Lines that define the quantisation, and the arguments of ``from_pretrained`` that use it."""
    if source.config.quantization == "none":
        return "", ""
    options = settings(source.config.quantization, source.task.heads)
    arguments = "".join(f"    {name}={value!r},\n" for name, value in options.items())
    return (
        "# Quantised with bitsandbytes as in training, and on the GPU if there is one.\n"
        "import torch\n"
        "from transformers import BitsAndBytesConfig\n\n"
        f"quantization = BitsAndBytesConfig(\n{arguments})\n",
        ",\n    quantization_config=quantization, dtype=torch.float32",
    )


def _fill_with_adapter(source: Source, folder: Path) -> None:
    check_alone(source.model)
    attach_model(source.client_model, source.model)
    export_adapter(source.client_model.model, folder, _adapter_card(source))


def attach_model(client_model: ClientModel, model: GlobalModel) -> None:
    """Attach the adapter of a global model, with its values, to the backbone."""
    client_model.attach(model.adapter)
    set_tensors(client_model.parameters, model.tensors)


def _check_logits(task: Task, folder: Path, expected: torch.Tensor) -> None:
    """Load the merged model and compare its logits: PEFT cannot merge every type exactly."""
    model = task.auto_class.from_pretrained(folder)
    logits = _logits(model, AutoTokenizer.from_pretrained(folder))
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
        raise DroppeftError(
            f"{out}: cannot be written ({reason}); choose another folder with --out"
        ) from None


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


def _adapter_card(source: Source) -> str:
    return f"""---
library_name: {loading_of(source.adapter_type).library}
base_model: {json.dumps(source.config.model)}
tags: [{source.adapter_type}, federated, droppeft]
---
# Adapter trained by droppeft

{_table(source)}
In this folder:

```python
{adapter_lines(source, ".")}```
"""


def _merged_card(source: Source) -> str:
    return f"""---
library_name: transformers
base_model: {json.dumps(source.config.model)}
tags: [federated, droppeft]
---
# Model fine-tuned by droppeft

Adapters ({source.adapter_type}) were trained, and are merged into the weights here.
{_merged_values(source)}
{_table(source)}
In this folder:

```python
{merged_lines(source, ".")}```
"""


def _table(source: Source) -> str:
    config = source.config
    return f"""\
| | |
|---|---|
| method | {config.method} |
| whose model | {_whose(source)} |
| base model | {config.model}{_bits(config)} |
| data | {config.data} (content hash {source.data_hash}) |
{_classes(source)}| round | {source.round} of {config.rounds} |
| cohort | {config.cohort_size} of {config.clients} clients in each round |
| seed | {config.seed} |
| parameters of adapter and head | {count_parameters(source.client_model.parameters):,} |
{_quality(source)}
"""


def _whose(source: Source) -> str:
    if source.client is None:
        return "the global model"
    return f"the model with which client {source.client} would start its next local training"


def _merged_values(source: Source) -> str:
    if source.config.quantization == "none":
        return ""
    quality = source.task.metrics[0].label
    return f"""\
They were trained on a base{_bits(source.config)}.
Here these linear maps are dequantised to full precision; the {quality} was recorded with the
quantised ones.
"""


def _bits(config: Config) -> str:
    if config.quantization == "none":
        return ""
    bits = config.quantization.removesuffix("bit")
    return f" with its linear maps in {bits} bits (bitsandbytes)"


def _classes(source: Source) -> str:
    is_classifier = not source.task.generates
    return f"| classes | {len(source.label_names)} |\n" if is_classifier else ""


def _quality(source: Source) -> str:
    metric = source.task.metrics[0]
    whose = "" if source.client is None else f" of client {source.client}"
    if source.value is None:
        return f"| {metric.label}{whose} | not evaluated at this round |"
    precision = source.config.training.precision
    half = "" if precision == "fp32" else f", computed in {precision} (the lines below: in fp32)"
    where = f"on {source.rows} test texts{whose}{half}"
    return f"| {metric.label} {where} | {source.value:.4f} |"


def _cut(source: Source) -> str:
    if source.task.generates:
        asked = (
            'messages = [{"role": "user", "content": "…"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
            ")\n"
        )
        if not source.backbone.tokenizer.chat_template:
            asked = 'inputs = tokenizer("…", return_tensors="pt")\n'
        return (
            f"{asked}tokens = model.generate(**inputs, max_new_tokens=64)[0]\n"
            'print(tokenizer.decode(tokens[inputs["input_ids"].shape[1]:]))\n'
        )
    length = source.config.training.max_length
    pairs = "" if source.config.data == "builtin" else "; of a pair: tokenizer(first, second, …)"
    return f"# Texts were cut: tokenizer(text, truncation=True, max_length={length}){pairs}\n"
