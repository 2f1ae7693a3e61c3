"""The model card of an export: what the model is, and Python code that loads it; ours.

A card contains nothing from the texts. Names of classes are in a file of their own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from droppeft.adapters.attach import loading_of
from droppeft.adapters.by_layer import count_parameters
from droppeft.client.client_model import ClientModel
from droppeft.config import Config
from droppeft.messages.server_state import GlobalModel
from droppeft.models.loading import Backbone
from droppeft.models.packaged import ON_THE_HUB
from droppeft.models.quantization import settings
from droppeft.tasks.task import Task

CLASSES = "classes.json"
"""The file of an exported adapter with the names of the classes, in the order of their indices."""


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


def adapter_lines(source: Source, folder: str) -> str:
    """Return Python code that loads the adapter in ``folder`` and uses it."""
    if source.backbone.path.startswith("config:"):
        return (
            f"# The weights of {source.backbone.path} are random and in no file:\n"
            "# droppeft export --merge writes a model that can be loaded.\n"
        )
    write = _generating if source.task.generates else _classifying
    return write(source, folder)


def merged_lines(source: Source, folder: str) -> str:
    """Return Python code that loads the merged model in ``folder`` and uses it."""
    if source.task.generates:
        auto = source.task.auto_class.__name__
        return f"""\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained({_quoted(folder)}).eval()
tokenizer = AutoTokenizer.from_pretrained({_quoted(folder)})
{_answer(source)}"""
    return f"""\
from transformers import pipeline

classify = pipeline("text-classification", model={_quoted(folder)}, truncation=True)
{_ask(source)}"""


def adapter_card(source: Source) -> str:
    """Return the model card of an adapter."""
    loading = loading_of(source.adapter_type)
    return f"""---
library_name: {loading.library}
{_base_model(source)}pipeline_tag: {_pipeline(source)}
tags: [{source.adapter_type}, federated, droppeft]
---
# Adapter trained by droppeft

{_table(source)}
In this folder:

```python
{adapter_lines(source, ".")}```
{_about_loading(source)}"""


def merged_card(source: Source) -> str:
    """Return the model card of a merged model."""
    return f"""---
library_name: transformers
{_base_model(source)}pipeline_tag: {_pipeline(source)}
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


# Code


def _classifying(source: Source, folder: str) -> str:
    quantised, options = _quantised_lines(source)
    arguments = f"id2label=id2label, ignore_mismatched_sizes=True{options}"
    imports, load = _loading(
        source, folder, "pipeline", lambda path: f"\n    {path}, {arguments}\n"
    )
    where, padding = _quoted(folder), _padding(source)
    return f"""\
import json

{imports}

with open({_quoted(str(Path(folder) / CLASSES))}, encoding="utf-8") as file:
    id2label = dict(enumerate(json.load(file)))
{quantised}{load}{padding}
classify = pipeline("text-classification", model=model, tokenizer={where}, truncation=True)
{_ask(source)}"""


def _generating(source: Source, folder: str) -> str:
    quantised, options = _quantised_lines(source)
    imports, load = _loading(source, folder, "AutoTokenizer", lambda path: f"{path}{options}")
    return f"""\
{imports}

{quantised}{load}{_padding(source)}
model = model.eval()
tokenizer = AutoTokenizer.from_pretrained({_quoted(folder)})
{_answer(source)}"""


def _loading(
    source: Source, folder: str, also: str, arguments: Callable[[str], str]
) -> tuple[str, str]:
    """The imports, and the lines that load the model with its adapter.

    Args:
        also: what else is imported from transformers.
        arguments: of ``from_pretrained``, for a quoted folder.
    """
    loading, auto = loading_of(source.adapter_type), source.task.auto_class.__name__
    if loading.library == "peft":
        auto = f"AutoPeft{auto[4:]}"
        imports = f"from peft import {auto}\nfrom transformers import {also}"
        return imports, f"model = {auto}.from_pretrained({arguments(_quoted(folder))})"
    names = ", ".join(sorted((auto, also)))
    return f"from transformers import {names}\n\n{loading.import_line}", (
        f"model = {auto}.from_pretrained({arguments(_quoted(_base_path(source)))})\n"
        f"model = {loading.function}(model, {_quoted(folder)})"
    )


def _quoted(text: str) -> str:
    """A string as Python code, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _padding(source: Source) -> str:
    """A new line that names the padding token, if the files name none or another."""
    if not source.backbone.sets_padding:
        return ""
    settings = "generation_config" if source.task.generates else "config.get_text_config()"
    return f"\nmodel.{settings}.pad_token_id = {source.backbone.tokenizer.pad_token_id}"


def _base_path(source: Source) -> str:
    return source.backbone.source.readable


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
        ", quantization_config=quantization, dtype=torch.float32",
    )


def _ask(source: Source) -> str:
    """The line that classifies; texts are truncated as in the run, by the tokenizer's settings."""
    pairs = "" if source.config.data == "builtin" else '  # a pair: {"text": …, "text_pair": …}'
    return f'print(classify("A text to classify")){pairs}\n'


def _answer(source: Source) -> str:
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


# Text


def _base_model(source: Source) -> str:
    """The line that names the base model as the Hub knows it; none for a folder of this machine."""
    name = ON_THE_HUB.get(source.config.model, source.config.model)
    return "" if Path(name).is_absolute() else f"base_model: {json.dumps(name)}\n"


def _pipeline(source: Source) -> str:
    return "text-generation" if source.task.generates else "text-classification"


def _about_loading(source: Source) -> str:
    """What to know about the base model, which is not in the folder."""
    notes = []
    if not source.task.generates:
        notes.append(
            "transformers reports that the classifier of the base model is new, or has another "
            "size. It is replaced by that of this folder."
        )
    base, name = _base_path(source), source.config.model
    if Path(base).is_dir():
        where = (
            "The code above"
            if loading_of(source.adapter_type).library == "droppeft"
            else "`base_model_name_or_path` in `adapter_config.json`"
        )
        instead = "that folder there"
        if name in ON_THE_HUB:
            instead = f"`{ON_THE_HUB[name]}`, from which it was made,"
        notes.append(
            f"{where} names the base model by its folder on the machine of the run, `{base}`. "
            f"Elsewhere, replace it by {instead} or use `droppeft export --merge`, which writes "
            "a model that needs no other."
        )
    return "".join(f"\n{note}\n" for note in notes)


def _table(source: Source) -> str:
    config = source.config
    return f"""\
| | |
|---|---|
| method | {config.method} |
| whose model | {_whose(source)} |
| base model | {_name(config.model)}{_bits(config)} |
| {_role_of_data(config)} | {_name(config.data)} (content hash {source.data_hash}) |
{_classes(source)}| round | {source.round} of {config.rounds} |
| cohort | {config.cohort_size} of {config.clients} clients in each round |
| seed | {config.seed} |
| parameters of adapter and head | {count_parameters(source.client_model.parameters):,} |
{_quality(source)}
"""


def _role_of_data(config: Config) -> str:
    return "test data" if config.partition.kind == "sites" else "data"


def _name(data_or_model: str) -> str:
    """A name without the folders of this machine."""
    path = Path(data_or_model)
    return path.name if path.is_absolute() else data_or_model


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
