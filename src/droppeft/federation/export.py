"""The adapter that a run leaves: PEFT's format, with a card that says how to load it."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from droppeft.adapters.attach import export_adapter
from droppeft.adapters.by_layer import count_parameters, set_tensors
from droppeft.errors import DroppeftError
from droppeft.federation.prepare import Prepared
from droppeft.files import sync
from droppeft.plans import GlobalModel


def write_adapter(
    prepared: Prepared, model: GlobalModel, facts: Mapping[str, Any], out: Path
) -> str:
    """Write ``out/adapter`` in one step and return its tensors' hash; an older one is replaced.

    Raises:
        DroppeftError: the model has a base delta, for which PEFT's format has no place.
    """
    if model.base_delta is not None:
        raise DroppeftError("a model with a base delta cannot be exported as an adapter alone")
    bench, folder = prepared.site.bench, out / "adapter"
    bench.wear(model.adapter)
    set_tensors(bench.parameters, model.tensors)
    partial = out / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    export_adapter(bench.model, partial, _card(prepared, facts))
    for path in partial.iterdir():
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    sync(out)
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def _card(prepared: Prepared, facts: Mapping[str, Any]) -> str:
    config, names = prepared.config, prepared.data.label_names
    return f"""---
library_name: peft
base_model: {prepared.backbone.path}
tags: [lora, federated, droppeft]
---
# Adapter trained by droppeft

| | |
|---|---|
| method | {config.method} |
| base model | {config.model} |
| data | {config.data} (content hash {prepared.data.content_hash}) |
| classes | {len(names)} |
| rounds x cohort of devices | {config.rounds} x {config.cohort} of {config.devices} |
| seed | {config.seed} |
| trainable parameters | {count_parameters(prepared.site.bench.parameters):,} |
| accuracy on {facts["rows"]} test texts | {facts["accuracy"]:.4f} |

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = "{prepared.backbone.path}"
id2label = {dict(enumerate(names))!r}
model = AutoModelForSequenceClassification.from_pretrained(
    base, id2label=id2label, ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(model, "adapter").eval()
tokenizer = AutoTokenizer.from_pretrained(base)
```
"""
