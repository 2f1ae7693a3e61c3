"""Whole runs with other adapters than LoRA, from the setting to the exported folder."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from droppeft.adapters.types import BOTTLENECK
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.messages.tensors import HEAD, OTHER
from droppeft.server.prepare import Prepared
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from droppeft.transports.flower.wire_format import RunContext, pack_instruction, unpack_instruction
from runs import Recorder, adapter_bytes, delivered_model, rows_of
from tiny import save_tiny_model

TYPES: dict[str, tuple[str, ...]] = {
    BOTTLENECK: ("adapter.width=4",),
    "ia3": (),
    "loha": ("adapter.rank=2", "adapter.options.rank_dropout=0.1"),
    "prefix_tuning": ("adapter.tokens=3",),
    "prompt_tuning": ("adapter.tokens=3", "adapter.options.prompt_tuning_init=SAMPLE_VOCAB"),
}


@pytest.fixture(scope="module", params=TYPES)
def finished(
    request: pytest.FixtureRequest,
    tiny_overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """A run of one type, in which every step drops a layer."""
    out = tmp_path_factory.mktemp("types") / request.param
    overrides = (f"adapter.type={request.param}", *TYPES[request.param], "dropout.count=1")
    without_dropout = [
        override for override in tiny_overrides if not override.startswith("dropout.")
    ]
    start_run(
        load_config(None, [*without_dropout, *overrides, "training.learning_rate=0.01"]),
        out,
        Recorder(),
    )
    return request.param, out


def measured(folder: Path, data: Path) -> tuple[float, float]:
    """Accuracy and loss on the test texts of the model that the lines of the card load."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    loaded: dict[str, Any] = {}
    exec(found.group(1), loaded)
    model, tokenizer = loaded["classify"].model, loaded["classify"].tokenizer
    with (data / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = list(model.config.id2label.values())
    labels = torch.tensor([names.index(row["label"]) for row in rows])
    with torch.inference_mode():
        batches = [tokenizer(row["text"], return_tensors="pt") for row in rows]
        logits = torch.cat([model(**batch).logits for batch in batches])
    right = (logits.argmax(dim=-1) == labels).double().mean().item()
    return right, functional.cross_entropy(logits, labels).item()


@pytest.mark.sample("bottleneck", "prefix_tuning")
def test_the_exported_adapter_gives_the_reported_figures(
    finished: tuple[str, Path], tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, out = finished
    monkeypatch.chdir(out / "adapter")
    accuracy, loss = measured(out / "adapter", Path(tiny_overrides[1].partition("=")[2]))
    result = json.loads((out / "result.json").read_text())
    assert accuracy == result["global_accuracy"]
    assert loss == pytest.approx(result["global_loss"], abs=1e-6)
    assert abs(loss - result["initial_loss"]) > 1e-4
    card = (out / "adapter" / "README.md").read_text()
    assert f"library_name: {'droppeft' if name == BOTTLENECK else 'peft'}\n" in card
    assert f"tags: [{name}, " in card


@pytest.mark.sample("bottleneck", "prefix_tuning")
def test_tensors_are_grouped_by_layer(finished: tuple[str, Path]) -> None:
    name, out = finished
    tensors = delivered_model(out).tensors
    layers = [OTHER] if name == "prompt_tuning" else [0, 1, 2, 3]
    assert list(tensors) == [*layers, HEAD]
    assert all(row["failures"] == [] for row in rows_of(out / "rounds.jsonl"))


@pytest.mark.sample("bottleneck", "prefix_tuning")
def test_a_resumed_run_leaves_the_same_adapter(finished: tuple[str, Path], tmp_path: Path) -> None:
    """The specification comes back from the checkpoint with its options."""
    _, out = finished
    again = tmp_path / "run"
    shutil.copytree(out, again)
    sorted((again / "checkpoints").iterdir())[-1].unlink()
    (again / "result.json").unlink()
    shutil.rmtree(again / "adapter")
    resume_run(again, Recorder())
    assert adapter_bytes(again) == adapter_bytes(out)


@pytest.mark.parametrize("name", TYPES)
def test_an_instruction_is_sent_with_its_adapter(
    name: str, prepare_with: Callable[..., Prepared]
) -> None:
    prepared = prepare_with(f"adapter.type={name}", *TYPES[name])
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    received, _ = unpack_instruction(pack_instruction(instruction, RunContext({})))
    assert received.adapter == instruction.adapter


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adapter.type=lorra",), "adapter.type=lorra is unknown; did you mean lora?"),
        (
            ("adapter.type=adalora",),
            "adapter.type=adalora is refused: it needs calls in the training",
        ),
        (("adapter.type=ia3", "adapter.rank=4"), "adapter.rank: type ia3 has no such setting"),
        (("adapter.options.depth=4",), "adapter.options.depth: type lora has no such option; it"),
    ],
)
def test_a_wrong_type_is_refused_before_anything_is_read_or_written(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    listener = Recorder()
    config = load_config(None, ["data=/nowhere", "model=/nowhere", *overrides])
    with pytest.raises(DroppeftError, match=f"^{re.escape(message)}"):
        start_run(config, tmp_path / "run", listener)
    assert listener.steps == []
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", 2, "deberta-v2")
    overrides = [*tiny_overrides, f"model={model}", "dropout.mean=0", "adapter.type=prefix_tuning"]
    with pytest.raises(
        DroppeftError,
        match="a prefix consists of cached keys and values, which a deberta-v2 does not accept",
    ):
        start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_virtual_tokens_take_positions(tiny_overrides: list[str], tmp_path: Path) -> None:
    overrides = ["adapter.type=prompt_tuning", "adapter.tokens=20", "training.max_length=500"]
    with pytest.raises(DroppeftError) as caught:
        start_run(load_config(None, [*tiny_overrides, *overrides]), tmp_path / "run", Recorder())
    assert str(caught.value).startswith(
        "training.max_length=500 and adapter.tokens=20 is more than the 512 positions of model"
    )
