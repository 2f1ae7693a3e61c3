"""Gradient checkpointing: the same adapter, bit for bit, from less memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from adapter_contract import Attached, Case, case, texts
from droppeft.adapters.by_layer import get_tensors
from droppeft.adapters.types import BOTTLENECK
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import gated
from droppeft.layer_dropout.modes import skipping
from droppeft.messages.tensors import flatten
from droppeft.models.key_value_cache import without_cache
from droppeft.models.packaged import builtin_model_folder
from droppeft.server.run import start_run
from droppeft.tasks.classification import Classification
from droppeft.training.checkpointing import Call, checkpointed
from droppeft.training.loop import Step, Trainable, TrainOutcome, train
from handmade import TRAINING
from runs import Recorder

TASK = Classification(("input_ids",), 0, torch.device("cpu"))
GATES = ((True, True, True), (True, False, True), (False, True, True), (True, True, False))
LORA = replace(case("lora", "bert"), settings={"dropout": 0.1})
CASES = [
    *(replace(LORA, family=family) for family in ("bert", "deberta-v2", "gpt2", "llama")),
    *(replace(LORA, quantization=quantization) for quantization in ("8bit", "4bit")),
    *(case(name, "bert") for name in (BOTTLENECK, "ia3", "oft", "prompt_tuning")),
    *(case("prefix_tuning", family) for family in ("bert", "gpt2", "llama")),
]


def attached(chosen: Case = LORA) -> Attached:
    """A tiny model with random adapter values, and dropout in all dropout modules."""
    on = Attached(chosen)
    on.scramble()
    for module in on.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return on


def train_once(
    on: Attached, **settings: Any
) -> tuple[dict[str, bytes], TrainOutcome, torch.Tensor]:
    """Train one step per entry of GATES; values, outcome, and the generator's state after it."""
    rates = {"learning_rate": 5e-3, "head_learning_rate": 5e-3, "weight_decay": 0.1}
    torch.manual_seed(11)
    outcome = train(
        Trainable(on.model, on.blocks, on.groups, TASK),
        [Step([texts()], skipping(gates), 1.0) for gates in GATES],
        replace(TRAINING, **rates, **settings),
    )
    values = {name: array.tobytes() for _, name, array in flatten(get_tensors(on.groups))}
    return values, outcome, torch.get_rng_state()


def runs_of(on: Attached) -> list[int]:
    """Count how often the inside of each block runs, recomputation included."""
    runs = [0] * len(on.blocks)
    for layer, block in enumerate(on.blocks):

        def count(*_: object, layer: int = layer) -> None:
            runs[layer] += 1

        norms = (m for m in block.modules() if type(m).__name__.endswith(("LayerNorm", "RMSNorm")))
        next(norms).register_forward_pre_hook(count)
    return runs


def assert_same_training(chosen: Case, **settings: Any) -> None:
    """With and without checkpointing: values, counts, and random numbers used."""
    plain, lean = attached(chosen), attached(chosen)
    once, twice = runs_of(plain), runs_of(lean)
    values, outcome, state = train_once(plain, **settings)
    again, lean_outcome, lean_state = train_once(lean, checkpointing=True, **settings)
    assert again == values
    assert torch.equal(lean_state, state)
    for name in ("steps", "examples", "tokens", "loss", "active_steps", "importance"):
        assert getattr(lean_outcome, name) == getattr(outcome, name), name
    # Checkpointing was on: all ran a second time, and the meter ran one of each kind once more.
    assert once == [3, 3, 3]
    assert all(2 * one <= two <= 2 * one + 1 for one, two in zip(once, twice, strict=True))
    assert all(two >= 6 for two in twice)


@pytest.mark.parametrize(
    "chosen", CASES, ids=[f"{one.name}-{one.family}-{one.quantization}" for one in CASES]
)
def test_checkpointing_trains_the_same_bits(chosen: Case) -> None:
    assert_same_training(chosen)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_checkpointing_trains_the_same_bits_under_autocast(precision: str) -> None:
    assert_same_training(LORA, precision=precision)


def test_values_were_trained_and_dropout_was_on() -> None:
    """Otherwise the tests for equal bits would prove little."""
    still = attached()
    before = {name: array.tobytes() for _, name, array in flatten(get_tensors(still.groups))}
    values, _, _ = train_once(still)
    assert all(values[name] != bits for name, bits in before.items())
    quiet = attached()
    for module in quiet.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert train_once(quiet)[0] != values


def calls_of(on: Attached, active: tuple[bool, ...] = GATES[0]) -> list[Call]:
    """The calls that checkpointing reports in one training forward pass."""
    calls: list[Call] = []
    with checkpointed(on.model, on.blocks, calls.append), gated(on.blocks) as gates:
        gates.active = active
        TASK.loss(on.model.train(), texts())
    return calls


def test_exactly_the_blocks_that_run_are_reported() -> None:
    on = attached()
    assert [call.block for call in calls_of(on)] == list(on.blocks)
    assert [call.block for call in calls_of(on, GATES[1])] == [on.blocks[0], on.blocks[2]]


def test_a_call_has_all_tensors_that_are_stored_for_it() -> None:
    shapes = [tuple(tensor.shape) for tensor in calls_of(attached())[1].tensors]
    assert shapes == [(8, 7, 32), (8, 1, 7, 7)]  # hidden states and the mask
    prefix = [
        tuple(one.shape) for one in calls_of(attached(case("prefix_tuning", "bert")))[1].tensors
    ]
    # The cache holds keys and values of all 3 layers, of 3 virtual tokens and 2 heads each.
    assert prefix == [(8, 7, 32), (8, 1, 7, 10), *[(8, 2, 3, 16)] * 6]


def test_repeating_a_call_is_not_reported() -> None:
    on = attached(case("lora", "bert"))
    for module in on.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    first, second, _ = calls = calls_of(on)
    assert torch.equal(first.function(*first.inputs), second.tensors[0])
    assert len(calls) == 3


def test_neither_evaluation_nor_code_after_the_context_is_checkpointed() -> None:
    on = attached()
    before = [dict(vars(block)) for block in on.blocks]
    config = dict(vars(on.model.config))
    calls: list[Call] = []
    with without_cache(on.model), checkpointed(on.model, on.blocks, calls.append):
        on.model.eval()
        TASK.loss(on.model, texts())
        assert calls == []
    on.model.train()
    assert [dict(vars(block)) for block in on.blocks] == before
    assert dict(vars(on.model.config)) == config
    with (
        pytest.raises(RuntimeError, match="mine"),
        without_cache(on.model),
        checkpointed(on.model, on.blocks, calls.append),
    ):
        raise RuntimeError("mine")
    assert [dict(vars(block)) for block in on.blocks] == before
    assert dict(vars(on.model.config)) == config


def test_training_fills_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a cache was made")

    on = attached(case("lora", "llama"))
    monkeypatch.setattr("transformers.models.llama.modeling_llama.DynamicCache", refuse)
    train_once(on)


def test_layers_below_the_lowest_adapter_have_no_backward_pass() -> None:
    """With transformers' switch, embeddings require a gradient, and all layers would take part."""
    spec = LORA.spec
    on = Attached(LORA, replace(spec, layers=(None, None, spec.layers[2])))
    runs = runs_of(on)
    calls: list[Call] = []
    on.model.train()
    with checkpointed(on.model, on.blocks, calls.append):
        TASK.loss(on.model, texts()).backward()
    assert [call.tensors[0].requires_grad for call in calls] == [False] * 3
    assert runs == [1, 1, 2]


def save_tiny_mpnet(folder: Path) -> Path:
    """Save a model that supports layer dropout but not transformers' checkpointing."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
    config = AutoConfig.for_model(
        "mpnet",
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_without_checkpointing_is_refused_before_anything_is_written(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    model = save_tiny_mpnet(tmp_path / "model")
    overrides = [*tiny_overrides, f"model={model}", "training.checkpointing=true"]
    with pytest.raises(DroppeftError, match="cannot checkpoint the layers of a mpnet model; set"):
        start_run(load_config(None, overrides), tmp_path / "run", Recorder())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
