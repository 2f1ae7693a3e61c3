"""The exported adapter works without droppeft."""

import csv
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from droppeft.errors import DroppeftError
from droppeft.federation.device import take_turn
from droppeft.federation.export import write_adapter
from droppeft.federation.loading import site_of
from droppeft.federation.prepare import Prepared
from droppeft.plans import BaseDelta, Plan, flatten


def snippet(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return found.group(1)


def test_the_card_says_how_to_load_it(
    whole_run: Path, tiny_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole_run)
    loaded: dict[str, Any] = {}
    exec(snippet(whole_run / "adapter"), loaded)
    model, tokenizer = loaded["model"], loaded["tokenizer"]
    data = Path(tiny_words[1].partition("=")[2])
    with (data / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    right, losses = 0, []
    with torch.inference_mode():
        for row in rows:
            batch = tokenizer(row["text"], return_tensors="pt")
            logits = model(**batch).logits[0]
            right += model.config.id2label[int(logits.argmax())] == row["label"]
            truth = list(model.config.id2label.values()).index(row["label"])
            losses.append(float(-logits.log_softmax(0)[truth]))
    result = json.loads((whole_run / "result.json").read_text())
    assert right / len(rows) == result["global_accuracy"]
    assert sum(losses) / len(losses) == pytest.approx(result["global_loss"], abs=1e-5)


def test_the_hash_in_the_result_is_the_tensors_file_s(whole_run: Path) -> None:
    result = json.loads((whole_run / "result.json").read_text())
    content = (whole_run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert result["adapter_sha256"] == hashlib.sha256(content).hexdigest()


def test_a_changed_backbone_is_not_exported_as_if_it_were_not(
    prepared: Prepared, tmp_path: Path
) -> None:
    model = replace(prepared.state.model, base_delta=BaseDelta("v1", {}))
    with pytest.raises(DroppeftError, match="base delta cannot be exported"):
        write_adapter(prepared.loaded, model, {"rows": 1, "accuracy": 1.0}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_given_model_is_written_whatever_the_bench_wears(
    prepared: Prepared, plans: list[Plan], tmp_path: Path
) -> None:
    site = site_of(prepared.loaded)
    take_turn(site.bench, site.table, site.devices[0], site.config, plans[0])
    facts = {"rows": 60, "accuracy": 0.5}
    write_adapter(prepared.loaded, prepared.state.model, facts, tmp_path)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    sent = {
        name.replace(".modules_to_save", "").replace(".default", ""): array
        for _, name, array in flatten(prepared.state.model.tensors)
    }
    assert written.keys() == sent.keys()
    for name, array in sent.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
