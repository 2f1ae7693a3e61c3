"""Model folders of users of other libraries, used in a run."""

import csv
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EsmConfig,
    EsmForSequenceClassification,
    EsmTokenizer,
    Gemma3Config,
    PhobertTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from droppeft.command_line_words import config_to_measure
from droppeft.config import load_config, resolve_layers
from droppeft.models.loading import load_backbone
from droppeft.models.packaged import builtin_model_folder
from droppeft.resources import profiling
from droppeft.resources.estimate import combinations, option
from droppeft.resources.profile_run import run_steps
from droppeft.runs.export import export_run
from droppeft.server.run import start_run
from refusals import or_refused, refused
from runs import TOPICS, Recorder, write_tiny_data
from tiny import save_tiny_model

ONE_ROUND = ("rounds=1", "training.local_steps=1")


@pytest.fixture
def run_tiny(tiny_overrides: list[str], tmp_path: Path) -> Callable[..., Any]:
    """Function that runs a round with further overrides; returns the result and the listener."""

    def run(*overrides: str) -> tuple[dict[str, Any], Recorder]:
        listener = Recorder()
        # Settings of layer dropout are refused for methods without it.
        base = [override for override in tiny_overrides if not override.startswith("dropout.")]
        config = load_config(None, [*base, *ONE_ROUND, *overrides])
        return start_run(config, tmp_path / "run", listener), listener

    return run


# An adapter where a model is expected


@pytest.fixture
def adapter_model(whole_run: Path, tiny_overrides: list[str], tmp_path: Path) -> Path:
    """The folder of an adapter in PEFT's format, with a tokenizer beside it."""
    folder = tmp_path / "adapter"
    shutil.copytree(whole_run / "adapter", folder)
    AutoTokenizer.from_pretrained(tiny_overrides[0].partition("=")[2]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=fedlora", "adapter.type=bottleneck"],
        ["method=fedadapter", "cohort_size=3"],
        ["adapter.targets=key"],
        ["adapter.targets=key", "method=fedhetlora"],
        ["adapter.targets=query"],
    ],
    ids=" ".join,
)
def test_an_adapter_is_no_model(
    run_tiny: Callable[..., Any], adapter_model: Path, overrides: list[str]
) -> None:
    with refused("is an adapter.*merge"):
        run_tiny(f"model={adapter_model}", *overrides)


def test_a_merged_adapter_is_a_model(
    run_tiny: Callable[..., Any], whole_run: Path, tmp_path: Path
) -> None:
    merged = export_run(whole_run, tmp_path / "merged", merge=True)
    result, _ = run_tiny(f"model={merged.folder}")
    assert result["initial_accuracy"] is not None


# A head whose classes are in another order than the data's


@pytest.fixture
def permuted_model(trained_model: Path, tmp_path: Path) -> Path:
    """The trained model with the rows of its head, and their names, in another order."""
    model = AutoModelForSequenceClassification.from_pretrained(trained_model)
    with torch.no_grad():
        for values in (model.classifier.weight, model.classifier.bias):
            values.copy_(values.roll(1, 0))
    names = sorted(TOPICS)
    model.config.id2label = dict(enumerate([names[-1], *names[:-1]]))
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "permuted")
    AutoTokenizer.from_pretrained(trained_model).save_pretrained(tmp_path / "permuted")
    return tmp_path / "permuted"


def test_a_head_in_the_order_of_the_data_is_used(
    run_tiny: Callable[..., Any], trained_model: Path
) -> None:
    assert run_tiny(f"model={trained_model}")[0]["initial_accuracy"] == 1.0


def test_a_head_in_another_order_is_put_into_that_of_the_data(
    run_tiny: Callable[..., Any], permuted_model: Path
) -> None:
    assert run_tiny(f"model={permuted_model}")[0]["initial_accuracy"] == 1.0


# A configuration with a text model inside


@pytest.fixture
def make_gemma(tmp_path: Path) -> Callable[[str], Path]:
    """Function that saves a tiny Gemma 3 with a tokenizer that uses the given padding token."""

    def make(pad_token: str = "[PAD]") -> Path:
        tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
        tokenizer.pad_token = pad_token
        config = Gemma3Config(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "sliding_window": 16,
                "max_position_embeddings": 128,
            },
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "vision_use_head": False,
            },
            mm_tokens_per_image=4,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "g")
        tokenizer.save_pretrained(tmp_path / "g")
        return tmp_path / "g"

    return make


@pytest.mark.parametrize(
    "pad_token",
    [
        pytest.param("[PAD]", id="as in the text model"),
        pytest.param("[UNK]", id="by another token"),
    ],
)
def test_padding_changes_no_logits(make_gemma: Callable[[str], Path], pad_token: str) -> None:
    backbone = load_backbone(str(make_gemma(pad_token)), ("a", "b"), 0)
    model, tokenizer = backbone.model.eval(), backbone.tokenizer

    def logits(*texts: str) -> torch.Tensor:
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            return model(**inputs).logits[0]

    single = logits("good film")
    padded = logits("good film", "it was a very sad film and a bad one")
    assert float((single - padded).abs().max()) < 2e-6


def test_a_composite_model_can_be_estimated(make_gemma: Callable[[], Path]) -> None:
    overrides = [f"model={make_gemma()}", "adapter.targets=q_proj", "training.max_length=32"]
    found = option(next(combinations(None, overrides)), None)
    assert found.num_layers == 4
    assert found.memory.total > 0


def test_a_composite_model_can_be_profiled(
    make_gemma: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def here(config: Any, steps: int, *, release_memory: bool) -> Any:
        return run_steps(config, steps, release_memory=False)

    monkeypatch.setattr(profiling, "in_fresh_process", here)
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path))  # a profile run sets another one
    overrides = [f"model={make_gemma()}", "adapter.targets=q_proj", "training.max_length=32"]
    config = config_to_measure([*overrides, "threads=1", "accelerator=cpu"], ())
    config = resolve_layers(config, 4)
    [measured] = profiling.profile(config, [0.0], 1, 1, lambda: None)
    assert measured.timed_runs[0].trained == 4


# Damaged files

POINTER = f"""\
version https://git-lfs.github.com/spec/v1
oid sha256:{"0" * 64}
size 1000000
"""


def _pointer_to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)


def _pointer_to_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_text(POINTER)


def _truncated_pickle(folder: Path) -> None:
    weights, path = folder / "model.safetensors", folder / "pytorch_model.bin"
    torch.save(load_file(weights), path)
    weights.unlink()
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [_pointer_to_pickle, _truncated_pickle, _pointer_to_safetensors])
def test_damaged_weights_are_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    damage(folder)
    with refused(str(folder)):
        load_backbone(str(folder), ("a", "b"), 0)


@pytest.mark.parametrize("damage", [_pointer_to_pickle, _pointer_to_safetensors])
def test_a_pointer_file_is_named_in_the_error(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    damage(folder)
    with refused("(?i)git.lfs"):
        load_backbone(str(folder), ("a", "b"), 0)


# Tokenizers


def _write_proteins(folder: Path) -> Path:
    """Write two classes of proteins, each made of four different amino acids."""
    folder.mkdir()
    draw = random.Random(0)
    for split, rows in (("train", 120), ("test", 40)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            for row in range(rows):
                writer.writerow(("".join(draw.choices(("LAGV", "DEKR")[row % 2], k=16)), row % 2))
    return folder


def _esm(folder: Path) -> None:
    tokens = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <mask>"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(tokens.split()))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = EsmConfig(
        vocab_size=len(tokens.split()),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=1,
        mask_token_id=31,
        max_position_embeddings=130,
        position_embedding_type="rotary",
    )
    EsmForSequenceClassification(config).save_pretrained(folder)


def _phobert(folder: Path) -> None:
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{letter} 1\n" for letter in "LAGVDEKR"))
    (folder / "bpe.codes").write_text("L A 1\n")
    tokenizer = PhobertTokenizer(str(folder / "vocab.txt"), str(folder / "bpe.codes"))
    tokenizer.save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=1,
        max_position_embeddings=130,
        type_vocab_size=1,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize("save", [_esm, _phobert])
def test_a_tokenizer_in_python_trains_or_is_refused(
    save: Callable[[Path], None], run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(tmp_path / "model")
    data = _write_proteins(tmp_path / "proteins")
    with or_refused("tokenizer"):
        overrides = ["training.max_length=24", "adapter.targets=query,value"]
        result, _ = run_tiny(f"model={tmp_path / 'model'}", f"data={data}", *overrides)
        assert result["rounds"] == 1


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(
    run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model, data = save_tiny_model(tmp_path / "model"), tmp_path / "data"
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = len(tokenizer)
    tokenizer.add_tokens(["blorptastic", "zzuurgh"])
    tokenizer.save_pretrained(model)
    data.mkdir()
    write_tiny_data(data)
    for path in data.iterdir():
        path.write_text(path.read_text().replace("bread", "blorptastic"))
    with refused(f"makes the token {rows}, but the model has embeddings for {rows} tokens"):
        run_tiny(f"model={model}", f"data={data}")
