"""Model folders that users of neighbouring libraries have, and what a run makes of them."""

import csv
import pickle
import random
import re
import shutil
import warnings
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

from droppeft.config import load_config, resolve
from droppeft.models.loading import builtin_model_folder, load_backbone
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
def play(tiny_words: list[str], tmp_path: Path) -> Callable[..., Any]:
    """A round of the tiny run with further settings; returns its result and its watcher."""

    def run(*words: str) -> tuple[dict[str, Any], Recorder]:
        listener = Recorder()
        words = (*tiny_words, *ONE_ROUND, *words)
        return start_run(load_config(None, words), tmp_path / "run", listener), listener

    return run


# An adapter where a model is expected

TRAINED_UNSEEN = pytest.mark.xfail(
    strict=True,
    raises=pytest.fail.Exception,
    reason="The run begins without a word; the old adapter is lost, or trained beside the new one.",
)
OTHER_SENTENCE = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="The refusal speaks of something else than of the adapter in the folder.",
)


@pytest.fixture
def adapter_model(whole_run: Path, tiny_words: list[str], tmp_path: Path) -> Path:
    """The folder of an adapter in PEFT's format, with a tokenizer beside it."""
    folder = tmp_path / "adapter"
    shutil.copytree(whole_run / "adapter", folder)
    AutoTokenizer.from_pretrained(tiny_words[0].partition("=")[2]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["method=fedadaopt"], marks=TRAINED_UNSEEN),
        pytest.param(["method=fedadapter", "cohort_size=3"], marks=TRAINED_UNSEEN),
        pytest.param(["adapter.targets=key"], marks=TRAINED_UNSEEN),
        pytest.param(["adapter.targets=key", "method=fedhetlora"], marks=OTHER_SENTENCE),
        pytest.param(["adapter.targets=query"], marks=OTHER_SENTENCE),
    ],
    ids=" ".join,
)
def test_an_adapter_is_no_model(
    play: Callable[..., Any], adapter_model: Path, words: list[str]
) -> None:
    with refused("is an adapter.*merge"):
        play(f"model={adapter_model}", *words)


def test_a_merged_adapter_is_a_model(
    play: Callable[..., Any], whole_run: Path, tmp_path: Path
) -> None:
    merged = export_run(whole_run, tmp_path / "merged", merge=True)
    result, _ = play(f"model={merged.folder}")
    assert result["initial_accuracy"] is not None


# A head whose classes are in another order than the data's


@pytest.fixture
def turned_model(trained_model: Path, tmp_path: Path) -> Path:
    """The trained model with the rows of its head, and their names, in another order."""
    model = AutoModelForSequenceClassification.from_pretrained(trained_model)
    with torch.no_grad():
        for values in (model.classifier.weight, model.classifier.bias):
            values.copy_(values.roll(1, 0))
    names = sorted(TOPICS)
    model.config.id2label = dict(enumerate([names[-1], *names[:-1]]))
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "turned")
    AutoTokenizer.from_pretrained(trained_model).save_pretrained(tmp_path / "turned")
    return tmp_path / "turned"


def test_a_head_in_the_order_of_the_data_is_kept(
    play: Callable[..., Any], trained_model: Path
) -> None:
    assert play(f"model={trained_model}")[0]["initial_accuracy"] == 1.0


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="Rows of the head are taken in the order of the checkpoint, so every answer is wrong.",
)
def test_a_head_in_another_order_is_not_mistaken(
    play: Callable[..., Any], turned_model: Path
) -> None:
    """Its rows are put into the data's order, or it is a new one, or the user is told."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result, listener = play(f"model={turned_model}")
    told = [*listener.steps, *(str(one.message) for one in warned)]
    assert (
        result["initial_accuracy"] == 1.0
        or "classifier" in load_backbone(str(turned_model), sorted(TOPICS), 0).new_modules
        or any(re.search(r"\bhead\b", text) for text in told)
    )


# A configuration with a text model inside


@pytest.fixture
def make_gemma(tmp_path: Path) -> Callable[[str], Path]:
    """Save a tiny Gemma 3, which reads pictures too, with a tokenizer that pads as is said."""

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
        pytest.param(
            "[UNK]",
            id="by another token",
            marks=pytest.mark.xfail(
                strict=True,
                raises=AssertionError,
                reason="The padding is set beside the text model's, so the head reads padding.",
            ),
        ),
    ],
)
def test_padding_changes_no_answer(make_gemma: Callable[[str], Path], pad_token: str) -> None:
    backbone = load_backbone(str(make_gemma(pad_token)), ("a", "b"), 0)
    model, tokenizer = backbone.model.eval(), backbone.tokenizer

    def answer(*texts: str) -> torch.Tensor:
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            return model(**inputs).logits[0]

    alone = answer("good film")
    padded = answer("good film", "it was a very sad film and a bad one")
    assert float((alone - padded).abs().max()) < 2e-6


NO_PAD_TOKEN = pytest.mark.xfail(
    strict=True,
    raises=AttributeError,
    reason="The padding token is looked for in the outer configuration, which has none.",
)


@NO_PAD_TOKEN
def test_a_composite_model_can_be_planned(make_gemma: Callable[[], Path]) -> None:
    words = [f"model={make_gemma()}", "adapter.targets=q_proj", "training.max_length=32"]
    found = option(next(combinations(None, words)), None)
    assert found.num_layers == 4
    assert found.memory.total > 0


@NO_PAD_TOKEN
def test_a_composite_model_can_be_profiled(
    make_gemma: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def here(config: Any, steps: int, *, frugal: bool) -> Any:
        return run_steps(config, steps, frugal=False)

    monkeypatch.setattr(profiling, "in_fresh_process", here)
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path))  # a trial sets another one
    words = [f"model={make_gemma()}", "adapter.targets=q_proj", "training.max_length=32"]
    config = resolve(load_config(None, [*words, "threads=1", "accelerator=cpu"]), cuda=False)
    [measured] = profiling.profile(config, [0.0], 1, 1, lambda: None)
    assert measured.trials[0].executed == 4


# Files that are not what their names say

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


def _pickle_cut_off(folder: Path) -> None:
    weights, path = folder / "model.safetensors", folder / "pytorch_model.bin"
    torch.save(load_file(weights), path)
    weights.unlink()
    path.write_bytes(path.read_bytes()[:1000])


UNPICKLED = pytest.mark.xfail(
    strict=True,
    raises=pickle.UnpicklingError,
    reason="The text of a Git LFS pointer is unpickled, which ends in a traceback.",
)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_pointer_to_pickle, marks=UNPICKLED),
        pytest.param(
            _pickle_cut_off,
            marks=pytest.mark.xfail(
                strict=True,
                raises=RuntimeError,
                reason="torch's error about a file that is cut off is passed on as a traceback.",
            ),
        ),
        _pointer_to_safetensors,
    ],
)
def test_spoilt_weights_are_refused(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    spoil(folder)
    with refused(str(folder)):
        load_backbone(str(folder), ("a", "b"), 0)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_pointer_to_pickle, marks=UNPICKLED),
        pytest.param(
            _pointer_to_safetensors,
            marks=pytest.mark.xfail(
                strict=True,
                raises=AssertionError,
                reason="The refusal says 'header too large', which tells nobody what to do.",
            ),
        ),
    ],
)
def test_a_pointer_is_called_one(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    spoil(folder)
    with refused("(?i)git.lfs"):
        load_backbone(str(folder), ("a", "b"), 0)


# Tokenizers


def _write_proteins(folder: Path) -> Path:
    """Two classes of proteins, each of four amino acids of its own."""
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
    words = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <mask>"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words.split()))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = EsmConfig(
        vocab_size=len(words.split()),
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
@pytest.mark.xfail(
    strict=True,
    raises=AttributeError,
    reason="A tokenizer that is written in Python has no backend that could name its cache.",
)
def test_a_tokenizer_in_python_trains_or_is_refused(
    save: Callable[[Path], None], play: Callable[..., Any], tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(tmp_path / "model")
    data = _write_proteins(tmp_path / "proteins")
    with or_refused("tokenizer"):
        words = ["training.max_length=24", "adapter.targets=query,value"]
        result, _ = play(f"model={tmp_path / 'model'}", f"data={data}", *words)
        assert result["rounds"] == 1


@pytest.mark.xfail(
    strict=True,
    raises=IndexError,
    reason="Tokens without a row in the embeddings are found when the model is called.",
)
def test_a_tokenizer_with_more_tokens_than_rows_is_refused(
    play: Callable[..., Any], tmp_path: Path
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
    with refused(rf"(?=.*\b{rows}\b)(?=.*\b{rows + 2}\b)"):
        play(f"model={model}", f"data={data}")
