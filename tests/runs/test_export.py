"""Exported models work without droppeft and have the accuracy that the run recorded."""

import csv
import errno
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from droppeft.client.client_model import ClientModel
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import AdapterSpec, BaseDelta, Instruction, LayerAdapter
from droppeft.messages.server_state import GlobalModel
from droppeft.messages.tensors import Tensors, flatten
from droppeft.models.loading import load_backbone
from droppeft.models.sources import ModelSource
from droppeft.runs import checkpoints, export, model_files
from droppeft.runs.folder import locked
from droppeft.runs.model_cards import Source, adapter_lines
from droppeft.runs.model_files import save_merged, write_adapter
from droppeft.server.global_evaluation import evaluate_global
from droppeft.server.prepare import Prepared, evaluation_sample
from droppeft.server.run import Interrupted, start_run
from droppeft.tasks.classification import ClassificationTask
from droppeft.training.loop import Evaluation
from runs import TOPICS, Recorder, adapter_bytes, checkpoint_of, delivered_model, rows_of
from tiny import FAMILIES, save_tiny_model

TASK = ClassificationTask()
QUALITY = Evaluation({"accuracy": 0.5, "f1": 0.5, "loss": 1.0}, rows=60, wall_s=1.0, tokens=600)

VALUE = "bert.encoder.layer.1.attention.self.value.weight"


@pytest.fixture(scope="module")
def learned_run(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of a pretrained model; it is more accurate than a constant answer."""
    out = tmp_path_factory.mktemp("learned") / "run"
    words = [*tiny_overrides, "model=builtin", "rounds=2", "training.local_steps=4"]
    words += ["evaluation.personalised=false"]
    result = start_run(load_config(None, words), out, Recorder())
    assert result["global_accuracy"] > 0.5
    return out


def snippet(folder: Path) -> str:
    match = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert match
    return match.group(1)


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the code of the card in the folder that it names."""
    loaded: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(snippet(folder), loaded)
    return loaded


def rows_in_test(words: list[str]) -> list[dict[str, str]]:
    data = Path(words[1].partition("=")[2])
    with (data / "test.csv").open() as file:
        return list(csv.DictReader(file))


def measure(loaded: dict[str, Any], rows: Sequence[dict[str, str]]) -> tuple[float, float]:
    """Accuracy and mean loss by transformers' pipeline."""
    right, losses = 0, []
    for row, scores in zip(
        rows, loaded["classify"]([r["text"] for r in rows], top_k=None), strict=True
    ):
        by_name = {score["label"]: score["score"] for score in scores}
        right += scores[0]["label"] == row["label"]
        losses.append(-math.log(by_name[row["label"]]))
    return right / len(rows), sum(losses) / len(losses)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_model(run: Path, to: Path, change: Callable[[GlobalModel], GlobalModel]) -> Path:
    """Copy a run, with another model in the checkpoint that it delivers."""
    shutil.copytree(run, to)
    _, delivered = export.saved_model(to, None, None)
    state = replace(delivered.state, model=change(delivered.state.model))
    every = range(delivered.round + 9)
    checkpoints.save(to / "checkpoints", replace(delivered, state=state), every)
    return to


def with_delta(model: GlobalModel) -> GlobalModel:
    values = np.random.default_rng(0).normal(scale=5.0, size=(32, 32)).astype(np.float32)
    return replace(model, base_delta=BaseDelta("v1", {VALUE: values}))


# What a run writes at its end


def test_the_card_says_how_to_load_it(
    learned_run: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = run_snippet(learned_run / "adapter", monkeypatch)
    accuracy, loss = measure(loaded, rows_in_test(tiny_overrides))
    result = json.loads((learned_run / "result.json").read_text())
    assert accuracy == result["global_accuracy"]
    assert loss == pytest.approx(result["global_loss"], abs=1e-5)


def test_the_hash_in_the_result_is_the_tensors_file_s(whole_run: Path) -> None:
    result = json.loads((whole_run / "result.json").read_text())
    content = (whole_run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert result["adapter_sha256"] == hashlib.sha256(content).hexdigest()


def test_a_model_with_a_base_delta_is_not_written_as_an_adapter(
    prepared: Prepared, tmp_path: Path
) -> None:
    model = replace(prepared.state.model, base_delta=BaseDelta("v1", {}))
    with pytest.raises(DroppeftError, match="base delta cannot be exported"):
        write_adapter(prepared.loaded, model, 2, QUALITY, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_given_model_is_written_whatever_is_attached(
    prepared: Prepared, instructions: list[Instruction], tmp_path: Path
) -> None:
    clients = clients_of(prepared.loaded)
    clients[0].train(instructions[0])
    write_adapter(prepared.loaded, prepared.state.model, 2, QUALITY, tmp_path)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    sent = {
        name.replace(".modules_to_save", "").replace(".default", ""): array
        for _, name, array in flatten(prepared.state.model.tensors)
    }
    assert written.keys() == sent.keys()
    for name, array in sent.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


def test_whoever_may_read_the_folder_may_read_its_files(whole_run: Path) -> None:
    mode = (whole_run / "adapter").stat().st_mode & 0o444
    assert {path.stat().st_mode & 0o444 for path in (whole_run / "adapter").iterdir()} == {mode}


# A checkpoint as an adapter


def test_the_last_round_is_what_the_run_wrote(whole_run: Path, tmp_path: Path) -> None:
    done = export.export_run(whole_run, tmp_path / "new" / "adapter")
    assert done.folder == tmp_path / "new" / "adapter"
    assert files_of(done.folder) == adapter_bytes(whole_run)
    result = json.loads((whole_run / "result.json").read_text())
    assert (done.round, done.value, done.rows) == (3, result["global_accuracy"], 60)


def test_an_earlier_round_has_the_accuracy_of_its_row(
    learned_run: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = export.export_run(learned_run, tmp_path / "adapter", round=1)
    recorded = rows_of(learned_run / "rounds.jsonl")[0]["global_accuracy"]
    assert (done.round, done.value, done.rows) == (1, recorded, 20)
    card = (done.folder / "README.md").read_text()
    assert "| round | 1 of 2 |" in card
    assert f"| accuracy on 20 test texts | {recorded:.4f} |" in card
    rows = rows_in_test(tiny_overrides)
    sample = [rows[row] for row in evaluation_sample(len(rows), 20)]
    assert measure(run_snippet(done.folder, monkeypatch), sample)[0] == recorded


def test_the_lines_load_it_from_anywhere(
    whole_run: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = export.export_run(whole_run, tmp_path / "it's here")
    monkeypatch.chdir("/")
    loaded: dict[str, Any] = {}
    exec(done.lines, loaded)
    assert measure(loaded, rows_in_test(tiny_overrides))[0] == done.value


def test_by_default_the_new_folder_is_in_the_run(whole_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole_run, tmp_path / "run")
    assert export.export_run(run).folder == run / "adapter-round-3"
    assert export.export_run(run, merge=True).folder == run / "merged-round-3"
    assert export.export_run(run, round=2).folder == run / "adapter-round-2"


def test_a_card_contains_nothing_of_the_texts(whole_run: Path, tmp_path: Path) -> None:
    done = export.export_run(whole_run, tmp_path / "model", merge=True)
    for folder in (whole_run / "adapter", done.folder):
        card = (folder / "README.md").read_text()
        assert "classes | 3" in card
        assert not [word for words in TOPICS.values() for word in words if word in card]


def test_a_stopped_run(tiny_overrides: list[str], tmp_path: Path) -> None:
    class Impatient(Recorder):
        def round_done(self, row: Any) -> None:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        start_run(load_config(None, [*tiny_overrides, "evaluation.every=2"]), run, Impatient())
    newest, first = export.export_run(run), export.export_run(run, round=0)
    assert (newest.round, newest.value) == (1, None)
    assert "| accuracy | not evaluated at this round |" in (newest.folder / "README.md").read_text()
    facts = checkpoint_of(run, 0).facts
    assert (first.round, first.value, first.rows) == (0, facts["initial"]["accuracy"], 20)


def test_a_run_that_is_still_running(whole_run: Path, tmp_path: Path) -> None:
    with locked(whole_run):
        done = export.export_run(whole_run, tmp_path / "adapter")
    assert files_of(done.folder) == adapter_bytes(whole_run)


def run_on_a_copy(words: list[str], folder: Path) -> tuple[Path, Path]:
    """A run of one round on a copy of the data that nothing else uses."""
    data = shutil.copytree(words[1].partition("=")[2], folder / "data")
    start_run(load_config(None, [*words, f"data={data}", "rounds=1"]), folder / "run", Recorder())
    return folder / "run", data


def test_the_texts_are_not_needed(tiny_overrides: list[str], tmp_path: Path) -> None:
    run, data = run_on_a_copy(tiny_overrides, tmp_path)
    shutil.rmtree(data)
    assert files_of(export.export_run(run).folder) == adapter_bytes(run)


# What cannot be exported


def test_another_backbone_is_refused(tiny_overrides: list[str], tmp_path: Path) -> None:
    mine = shutil.copytree(tiny_overrides[0].partition("=")[2], tmp_path / "model")
    run = tmp_path / "run"
    start_run(load_config(None, [*tiny_overrides, f"model={mine}", "rounds=1"]), run, Recorder())
    shutil.rmtree(mine)
    save_tiny_model(mine, num_layers=3)
    for merge in (False, True):
        with pytest.raises(DroppeftError, match=r"the model .* has changed since this run started"):
            export.export_run(run, merge=merge)
    assert not list(run.glob("*-round-*"))


def test_missing_rounds_and_existing_folders_are_refused(whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(DroppeftError, match=r"holds no run \(no config.toml\)"):
        export.export_run(tmp_path)
    with pytest.raises(DroppeftError, match=r"no round 7; the saved rounds are: 3, 2"):
        export.export_run(whole_run, tmp_path / "adapter", round=7)
    (tmp_path / "taken").mkdir()
    with pytest.raises(DroppeftError, match=r"taken: exists already; choose another"):
        export.export_run(whole_run, tmp_path / "taken")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DroppeftError, match=r"adapter: cannot be written .* choose another"):
        export.export_run(whole_run, tmp_path / "file" / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DroppeftError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_interrupted_export_leaves_nothing(
    merge: bool,
    error: BaseException,
    seen: type[BaseException],
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(model_files, "sync", fail)  # everything has been written by then
    with pytest.raises(seen) as raised:
        export.export_run(whole_run, tmp_path / "model", merge=merge)
    if seen is DroppeftError:
        assert "cannot be written (No space left on device)" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# Merged into the backbone


def test_the_merged_model_needs_transformers_alone(
    learned_run: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = export.export_run(learned_run, tmp_path / "model", merge=True)
    assert "peft" not in snippet(done.folder)
    loaded = run_snippet(done.folder, monkeypatch)
    accuracy, loss = measure(loaded, rows_in_test(tiny_overrides))
    result = json.loads((learned_run / "result.json").read_text())
    assert accuracy == result["global_accuracy"] == done.value
    assert loss == pytest.approx(result["global_loss"], abs=1e-5)
    _, report = AutoModelForSequenceClassification.from_pretrained(
        done.folder, output_loading_info=True
    )
    assert not any(report.values())


def test_the_adapter_is_in_the_merged_weights(whole_run: Path, tmp_path: Path) -> None:
    done = export.export_run(whole_run, tmp_path / "model", merge=True)
    weights = load_file(done.folder / "model.safetensors")
    adapter = load_file(whole_run / "adapter" / "adapter_model.safetensors")
    config = load_config(whole_run / "config.toml")
    base = load_file(Path(config.model) / "model.safetensors")
    name = VALUE.removesuffix(".weight")
    b, a = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
    scale = config.adapter.alpha / config.adapter.rank
    assert np.abs(b @ a).max() > 0
    np.testing.assert_allclose(weights[VALUE], base[VALUE] + scale * (b @ a), atol=1e-6)
    head = adapter["base_model.model.classifier.weight"]
    np.testing.assert_array_equal(weights["classifier.weight"], head)


def test_a_base_delta_can_only_be_exported_merged(
    whole_run: Path,
    prepared: Prepared,
    tiny_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = with_model(whole_run, tmp_path / "run", with_delta)
    with pytest.raises(DroppeftError, match="base delta cannot be exported as an adapter alone"):
        export.export_run(run)
    done = export.export_run(run, merge=True)
    model = delivered_model(run)
    whole = np.arange(60, dtype=np.int64)
    with_it = evaluate_global(prepared, model, whole)
    without = evaluate_global(prepared, replace(model, base_delta=None), whole)
    accuracy, loss = measure(run_snippet(done.folder, monkeypatch), rows_in_test(tiny_overrides))
    assert abs(with_it.loss - without.loss) > 1e-4
    assert accuracy == with_it.metrics["accuracy"]
    assert loss == pytest.approx(with_it.loss, abs=1e-5)


def drawn(tensors: Tensors) -> Tensors:
    """Random values, so that every tensor matters: a fresh LoRA has B = 0 and changes nothing."""
    rng = np.random.default_rng(0)
    return {
        key: {
            name: rng.normal(scale=0.1, size=array.shape).astype(np.float32)
            for name, array in named.items()
        }
        for key, named in tensors.items()
    }


NAMES = ("a", "b", "c")


def source_of(
    base: Path,
    layers: Sequence[LayerAdapter],
    names: tuple[str, ...] = NAMES,
    overrides: Sequence[str] = (),
    **settings: Any,
) -> Source:
    """An adapter on a tiny model of two layers."""
    backbone = load_backbone(str(base), names, 0)
    client_model = ClientModel(backbone, TASK, "cpu", 0)
    spec = AdapterSpec(tuple(layers), **settings)
    model = GlobalModel(spec, drawn(client_model.fresh_tensors(spec)))
    config = load_config(None, [f"model={base}", *overrides])
    return Source(config, backbone, client_model, TASK, names, "hash", model, 1, 0.5, 60)


def assert_same_logits(source: Source, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export both ways, load both with the code of their cards, and compare logits."""
    model_files.save_adapter(source, folder / "adapter")
    save_merged(source, folder / "merged")
    logits = []
    for name in ("adapter", "merged"):
        classify = run_snippet(folder / name, monkeypatch)["classify"]
        texts = ["a few words", "words that are many more than the few of the other text"]
        batch = classify.tokenizer(texts, padding=True, return_tensors="pt")
        asked = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            logits.append(classify.model(**asked).logits)
    assert logits[0].std() > 0.01
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.sample("bert", "llama")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_merging_keeps_the_logits_of_every_model_family(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = (LayerAdapter("lora", 2), LayerAdapter("lora", 4))
    base = save_tiny_model(tmp_path / "base", 2, model_type)
    source = source_of(base, layers, alpha=8.0, targets=("all-linear",))
    assert_same_logits(source, tmp_path, monkeypatch)


@pytest.mark.sample("lora-3", "prefix_tuning-2", "bottleneck-7")
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("kind", ["lora", "prefix_tuning", "bottleneck"])
def test_an_export_knows_its_classes_and_truncates_as_the_run(
    kind: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of the base has two classes. The names are not in alphabetical order."""
    names = tuple(f"class “{number}”" for number in reversed(range(classes)))
    layer = {"lora": LayerAdapter("lora", 2), "bottleneck": LayerAdapter("bottleneck", width=4)}
    tokens = {"tokens": 2} if kind == "prefix_tuning" else {}
    base = save_tiny_model(tmp_path / "base", 2)
    settings = ("training.max_length=12",)
    layers = (layer.get(kind, LayerAdapter(kind)),) * 2
    source = source_of(base, layers, names, settings, **tokens)
    texts = ["a few words", "many more words than twelve " * 200]
    model_files.attach_model(source.client_model, source.model)
    tokenizer = source.backbone.tokenizer
    with torch.inference_mode():
        ids = [tokenizer(t, truncation=True, max_length=12, return_tensors="pt") for t in texts]
        expected = [source.client_model.model.eval()(**one).logits.softmax(1)[0] for one in ids]
    model_files.save_adapter(source, tmp_path / "adapter")
    if kind == "lora":
        save_merged(source, tmp_path / "merged")
    for folder in tmp_path.glob("[am]*"):
        answers = run_snippet(folder, monkeypatch)["classify"](texts, top_k=None)
        for answer, probabilities in zip(answers, expected, strict=True):
            found = {one["label"]: one["score"] for one in answer}
            wanted = dict(zip(names, probabilities.tolist(), strict=True))
            assert found == pytest.approx(wanted, abs=1e-5)


def test_a_decoder_without_a_padding_token_takes_texts_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny_model(tmp_path / "base", 2, "gpt2")
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.update(pad_token=None, eos_token="[SEP]", padding_side="left")
    path.write_text(json.dumps(settings))
    source = source_of(base, (LayerAdapter("lora", 2),) * 2)
    assert source.backbone.tokenizer.pad_token == "[SEP]"
    assert_same_logits(source, tmp_path, monkeypatch)


def test_a_model_of_random_weights_has_no_code_to_load_it(tmp_path: Path) -> None:
    source = source_of(save_tiny_model(tmp_path / "base", 2), (LayerAdapter("lora", 2),) * 2)
    of_shape = replace(source.backbone, source=ModelSource("config:bert-large"))
    shape = replace(source, backbone=of_shape)
    lines = adapter_lines(shape, "adapter").splitlines()
    assert all(line.startswith("# ") for line in lines)
    assert "droppeft export --merge writes a model" in lines[-1]


def test_a_head_is_merged_with_a_type_for_which_peft_does_not_wrap_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(save_tiny_model(tmp_path / "base", 2), (LayerAdapter("ln_tuning"),) * 2)
    assert_same_logits(source, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("name", "sizes"), [("prompt_tuning", {"tokens": 2}), ("bottleneck", {"width": 4})]
)
def test_types_that_do_not_change_weights_cannot_be_merged(
    name: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    settings = {key: value for key, value in sizes.items() if key == "tokens"}
    layer = LayerAdapter(name, width=sizes.get("width"))
    source = source_of(save_tiny_model(tmp_path / "base", 2), (layer,) * 2, **settings)
    with pytest.raises(DroppeftError, match=rf"{name} cannot be merged .*without --merge"):
        save_merged(source, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_peft_cannot_merge_is_refused(whole_run: Path, tmp_path: Path) -> None:
    def broken(model: GlobalModel) -> GlobalModel:
        tensors = {
            key: {name: np.full_like(array, np.nan) for name, array in named.items()}
            for key, named in model.tensors.items()
        }
        return replace(model, tensors=tensors)

    run = with_model(whole_run, tmp_path / "run", broken)
    with pytest.raises(DroppeftError, match=r"type lora cannot be merged into the backbone \(NaNs"):
        export.export_run(run, merge=True)
    assert not list(run.glob("*-round-*"))


def test_a_merge_that_changes_logits_is_refused(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "merged", lambda model: model.unload())
    with pytest.raises(DroppeftError, match="changes the model's logits; export it without"):
        export.export_run(whole_run, tmp_path / "model", merge=True)
    assert list(tmp_path.iterdir()) == []
