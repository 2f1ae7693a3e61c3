"""The adapter that a run leaves: PEFT's format, with a card that says how to load it."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from droppeft.adapters.attach import export_adapter
from droppeft.adapters.by_layer import count_parameters, set_tensors
from droppeft.federation.prepare import Prepared
from droppeft.files import sync_folder
from droppeft.plans import GlobalModel


def write_adapter(
    prepared: Prepared, model: GlobalModel, facts: Mapping[str, Any], out: Path
) -> str:
    """Write ``out/adapter`` in one step and return its hash; an older one is replaced."""
    bench, folder = prepared.site.bench, out / "adapter"
    bench.wear(model.adapter)
    set_tensors(bench.parameters, model.tensors)
    partial = out / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    export_adapter(bench.model, partial, _card(prepared, facts))
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    sync_folder(out)
    return folder_hash(folder)


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


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
model = AutoModelForSequenceClassification.from_pretrained(base, id2label=id2label)
model = PeftModel.from_pretrained(model, "adapter").eval()
tokenizer = AutoTokenizer.from_pretrained(base)
```
"""
