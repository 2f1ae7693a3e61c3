"""Layer dropout in training loops, models and trainers of users of similar libraries."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from droppeft.layer_dropout import find_blocks, gated, layer_dropout
from droppeft.layer_dropout.trainer import LayerDropoutCallback
from refusals import or_refused
from tiny import save_tiny_model, tiny_model

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 64, (4, 8), generator=generator),
        "labels": torch.tensor([0, 1, 0, 1]),
    }


# What a model with a dropped layer returns


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "deberta-v2"])
def test_attentions_have_an_entry_per_layer(
    model_type: str, batch: dict[str, torch.Tensor]
) -> None:
    model = tiny_model(4, model_type)
    model.set_attn_implementation("eager")
    model.train()
    with gated(find_blocks(model)[1]) as gates:
        gates.active = (True, False, True, True)
        output = model(batch["input_ids"], output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    assert [entry is None for entry in output.attentions] == [False, True, False, False]


# Copies of a model that has gates


@pytest.mark.parametrize("make_copy", [copy.deepcopy, AveragedModel])
def test_a_copy_uses_its_own_weights(
    make_copy: Callable[[nn.Module], Any], batch: dict[str, torch.Tensor]
) -> None:
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with or_refused("cop(y|ied)"):
        with layer_dropout(model, optimizer, mean=0.5):
            copied = make_copy(model)
            for _ in range(3):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        inner = getattr(copied, "module", copied).eval()
        fresh = tiny_model().eval()
        fresh.load_state_dict(inner.state_dict())
        with torch.no_grad():
            difference = inner(**batch).logits - fresh(**batch).logits
        assert float(difference.abs().max()) == 0.0


def test_training_a_copy_leaves_the_original_alone(batch: dict[str, torch.Tensor]) -> None:
    model = tiny_model().train()
    with or_refused("cop(y|ied)"):
        with layer_dropout(model, None, mean=0.5):
            copied = copy.deepcopy(model)
        copied.train()(**batch).loss.backward()
        assert not any(_has_gradient(block) for block in find_blocks(model)[1])
        assert any(_has_gradient(block) for block in find_blocks(copied)[1])


def _has_gradient(module: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in module.parameters())


# A model that drops layers by itself


def test_a_model_s_own_layerdrop_does_not_add_up() -> None:
    """Two of four layers run in every step, or the model is refused."""
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=4,
        ffn_dim=64,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        layerdrop=0.5,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    ids = torch.ones(2, 8, dtype=torch.long)
    ran, trainable = [], []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(OPTForCausalLM(config), lora).train()
        with or_refused("layerdrop"), layer_dropout(model, None, mean=0.5) as dropout:
            for step in range(8):
                dropout.step, before = step, sum(dropout.executed)
                trainable.append(model(input_ids=ids, labels=ids).loss.requires_grad)
                ran.append(sum(dropout.executed) - before)
    assert set(ran) <= {2}
    assert all(trainable)


# Forwards without gradients in a training step


class Trained(NamedTuple):
    """A step: its loss, gradients by parameter, open gates, and layers with a gradient."""

    loss: float
    gradients: dict[str, torch.Tensor]
    open: list[bool]
    trained: list[bool]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model of 6 layers."""
    return save_tiny_model(tmp_path_factory.mktemp("embedder") / "model", 6)


def contrastive_step(folder: Path, loss_name: str, **settings: int) -> Trained:
    """Run a step of a contrastive loss of sentence-transformers with layer dropout only."""
    from sentence_transformers import SentenceTransformer, losses  # slow to import

    model = SentenceTransformer(str(folder), device="cpu").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    pairs = [["a cat", "a dog", "the sun", "rain"], ["cats", "dogs", "sunny", "it rains"]]
    features = [model.preprocess(texts) for texts in pairs]
    with layer_dropout(model, None, mean=0.5) as dropout:
        loss = getattr(losses, loss_name)(model, **settings)(features, None)
        loss.backward()
    named = model.named_parameters()
    return Trained(
        float(loss),
        {name: value.grad for name, value in named if value.grad is not None},
        list(dropout.active),
        [_has_gradient(block) for block in find_blocks(model)[1]],
    )


PLAIN = ("MultipleNegativesRankingLoss", {})
CACHED = ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 2})


@pytest.mark.parametrize("loss", [PLAIN, CACHED], ids=["plain", "cached"])
def test_layers_with_a_gradient_have_open_gates(
    embedder: Path, loss: tuple[str, dict[str, int]]
) -> None:
    with or_refused("gradient|no_grad"):
        step = contrastive_step(embedder, loss[0], **loss[1])
        assert sum(step.open) == 3
        assert step.trained == step.open


def test_a_loss_in_two_passes_equals_its_plain_form(embedder: Path) -> None:
    plain = contrastive_step(embedder, PLAIN[0])
    with or_refused("gradient|no_grad"):
        cached = contrastive_step(embedder, CACHED[0], **CACHED[1])
        assert cached.loss == pytest.approx(plain.loss, abs=1e-5)
        assert cached.gradients.keys() == plain.gradients.keys()
        for name, gradient in cached.gradients.items():
            assert torch.allclose(gradient, plain.gradients[name], atol=1e-5)


# Trainers that compare two forwards of a model


def _dpo(folder: Path, out: Path, callbacks: list[Any]) -> float:
    """Return DPO's first loss minus ln 2, which is 0 if model and reference agree."""
    from trl import DPOConfig, DPOTrainer

    rows = {
        "prompt": ["Once upon a time"] * 4,
        "chosen": [" there was a cat."] * 4,
        "rejected": [" xx yy."] * 4,
    }
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    trainer = DPOTrainer(
        args=DPOConfig(max_length=64, gradient_checkpointing=False, **_arguments(out)),
        peft_config=lora,
        **_common(folder, rows, callbacks),
    )
    return _first_log(trainer)["loss"] - math.log(2)


def _grpo(folder: Path, out: Path, callbacks: list[Any]) -> float:
    """Return the share of GRPO's probability ratios that are clipped before the first step."""
    from trl import GRPOConfig, GRPOTrainer

    rows = {"prompt": ["Once upon a time"] * 8}
    trainer = GRPOTrainer(
        args=GRPOConfig(
            num_generations=4, max_completion_length=8, num_iterations=2, **_arguments(out)
        ),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        **_common(folder, rows, callbacks),
    )
    return _first_log(trainer)["clip_ratio/region_mean"]


def _arguments(out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _common(folder: Path, rows: dict[str, list[str]], callbacks: list[Any]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "train_dataset": Dataset.from_dict(rows),
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }


def _first_log(trainer: Any) -> dict[str, float]:
    trainer.train()
    first: dict[str, float] = trainer.state.log_history[0]
    return first


def _documented(trainer: str) -> bool:
    """Whether the documentation of the callback mentions the trainer."""
    return trainer in README.read_text() + (LayerDropoutCallback.__doc__ or "")


TRAINERS = {"DPO": _dpo, "GRPO": _grpo}


@pytest.mark.parametrize("name", TRAINERS)
def test_without_layer_dropout_model_and_reference_agree(
    name: str, data_folder: Path, tmp_path: Path
) -> None:
    distance = TRAINERS[name](data_folder / "stories260K", tmp_path, [])
    assert distance == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", TRAINERS)
def test_with_layer_dropout_they_agree_or_it_is_documented(
    name: str, data_folder: Path, tmp_path: Path
) -> None:
    """The same layers run in both, or there is an error, or the documentation mentions it."""
    with or_refused(f"{name}|reference"):
        distance = TRAINERS[name](
            data_folder / "stories260K", tmp_path, [LayerDropoutCallback(0.4)]
        )
        assert distance == pytest.approx(0, abs=1e-4) or _documented(name)
