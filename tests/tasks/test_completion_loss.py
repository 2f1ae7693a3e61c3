"""The loss of completions equals transformers' own loss, with the head at few positions."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import architecture_contract as contract
from architecture_contract import CASES, Case
from droppeft.adapters.attach import CAUSAL_LM, attach
from droppeft.config import AdapterConfig
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.layer_dropout import find_blocks, gated
from droppeft.models.precision import autocast
from droppeft.tasks import completion_loss as module
from droppeft.tasks.completion_loss import IGNORED, CompletionLoss, completion_loss
from droppeft.training.activation_memory import ActivationMeter
from droppeft.training.checkpointing import checkpointed

LAYERS = contract.LAYERS
SCALED = {
    "cohere": {"logit_scale": 3.0},
    "cohere2": {"logit_scale": 3.0},
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
}
"""Settings with which a model changes the logits that its head returns."""

CAUSAL = tuple(
    replace(case, settings={**case.settings, **SCALED.get(case.model_type, {})})
    for case in CASES
    if contract.generator(case) is AutoModelForCausalLM
)
OFTEN = ("llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3", "cohere", "granite", "gpt2")
LLAMA = next(case for case in CAUSAL if case.model_type == "llama")

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens of the tiny vocabulary at a time, so that there are several parts."""
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2 * contract.COMMON["vocab_size"])


def batch(seed: int = 0) -> Batch:
    """Three rows of at most 9 tokens, padded on the right; some tokens are learnt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 38, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 8:] = 0
    labels = ids.clone()
    labels[0, :4] = labels[1, :3] = labels[2, 2:5] = IGNORED
    labels[mask == 0] = IGNORED
    return {"input_ids": ids, "attention_mask": mask}, labels


def model_of(case: Case = LLAMA, **settings: Any) -> Any:
    """A tiny causal model of which the blocks' matrices alone are trained."""
    case = replace(case, settings={**case.settings, **settings})
    model = contract.build(case, AutoModelForCausalLM)
    contract.train_only_blocks(model)
    return model


def lora(model: Any, **settings: Any) -> Any:
    """The model with an adapter that has random values."""
    spec = adapter_spec(AdapterConfig.model_validate(settings), LAYERS)
    wrapped: Any = attach(model, spec, find_blocks(model)[0], 0, task_type=CAUSAL_LM)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.1)
    return wrapped


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    named = model.named_parameters()
    found = {name: value.grad.clone() for name, value in named if value.grad is not None}
    assert found
    return found


def of_transformers(model: Any, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> Any:
    """Loss by transformers' own path: all logits, and the mean over the supervised tokens."""
    return model(**inputs, labels=labels, use_cache=False).loss


def assert_same(model: Any, found: CompletionLoss, expected: torch.Tensor) -> None:
    """Compare loss and gradients, to rounding in fp32."""
    torch.testing.assert_close(found.loss / found.targets, expected, rtol=1e-5, atol=1e-6)
    theirs = gradients(model, expected)
    ours = gradients(model, found.loss / found.targets)
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) <= 1e-5 * largest, name


@pytest.mark.sample(*OFTEN)
@pytest.mark.parametrize("case", CAUSAL, ids=lambda case: case.name)
def test_loss_and_gradients_are_those_of_transformers(case: Case) -> None:
    model = model_of(case)
    inputs, labels = batch()
    assert_same(
        model, completion_loss(model, inputs, labels), of_transformers(model, inputs, labels)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"targets": ["all-linear"]},
        {"type": "bottleneck", "width": 4},
        {"type": "prefix_tuning", "tokens": 3},
        {"type": "prompt_tuning", "tokens": 3},
    ],
    ids=str,
)
def test_gradients_of_adapters_are_those_of_transformers(settings: dict[str, Any]) -> None:
    for seed in range(10):
        model = lora(model_of(), **settings).train()
        inputs, labels = batch(seed)
        labels[:, 0] = IGNORED  # transformers predicts the first token from a prompt before it
        found = completion_loss(model, inputs, labels)
        assert_same(model, found, of_transformers(model, inputs, labels))


def test_ten_batches_are_counted_and_predicted_as_all_logits_say() -> None:
    model = model_of()
    with torch.inference_mode():
        for seed in range(10):
            inputs, labels = batch(seed)
            found = completion_loss(model, inputs, labels)
            logits, wanted = model(**inputs).logits[:, :-1], labels[:, 1:]
            chosen = wanted != IGNORED
            right = (logits.argmax(-1) == wanted) & chosen
            assert (found.targets, found.correct) == (int(chosen.sum()), int(right.sum()))
            sums = functional.cross_entropy(
                logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="sum"
            )
            torch.testing.assert_close(found.loss, sums)


def test_the_head_runs_at_supervised_positions_alone_and_few_at_a_time() -> None:
    model, rows = model_of(), []
    model.lm_head.register_forward_hook(lambda *call: rows.append(call[2].shape[:-1].numel()))
    inputs, labels = batch()
    completion_loss(model, inputs, labels)
    targets = int((labels[:, 1:] != IGNORED).sum())
    assert sum(rows) == targets
    assert max(rows) == 2


def test_the_logits_are_not_kept_for_the_backward_pass() -> None:
    """Also not by hooks on saved tensors, as those that measure memory set."""
    kept = []
    for vocabulary in (64, 4096):
        model = lora(model_of(vocab_size=vocabulary)).train()
        meter = ActivationMeter(model)
        with meter.measuring():
            completion_loss(model, *batch())
        kept.append(meter.peak_bytes)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_loss_is_summed_in_fp32_under_autocast(precision: str) -> None:
    model, cpu = lora(model_of()).train(), torch.device("cpu")
    inputs, labels = batch()
    full = completion_loss(model, inputs, labels)
    with autocast(precision, cpu):
        half = completion_loss(model, inputs, labels)
        expected = of_transformers(model, inputs, labels)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss / half.targets, expected.float(), rtol=1e-3, atol=1e-3)
    assert not torch.equal(half.loss, full.loss)
    ours, theirs = gradients(model, half.loss / half.targets), gradients(model, expected)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0.1, atol=0.02)


def test_weights_in_bf16_leave_adapters_in_fp32() -> None:
    model = lora(model_of().to(torch.bfloat16)).train()
    inputs, labels = batch()
    found = completion_loss(model, inputs, labels)
    assert found.loss.dtype == torch.float32
    expected = of_transformers(model, inputs, labels)
    torch.testing.assert_close(found.loss / found.targets, expected.float(), rtol=0.02, atol=0.02)
    assert {value.dtype for value in gradients(model, found.loss).values()} == {torch.float32}


def test_a_dropped_layer_equals_a_removed_one() -> None:
    model = model_of()
    small = copy.deepcopy(model)
    del small.model.layers[1]
    small.config.num_hidden_layers = LAYERS - 1
    inputs, labels = batch()
    expected = completion_loss(small, inputs, labels)
    theirs = gradients(small, expected.loss)
    with gated(find_blocks(model)[1]) as gates:
        assert torch.equal(completion_loss(model, inputs, labels).loss, full(model))
        gates.active = (True, False, True)
        found = completion_loss(model, inputs, labels)
        ours = gradients(model, found.loss)
    assert torch.equal(found.loss, expected.loss)
    assert not [name for name in ours if ".layers.1." in name]
    named = {name.replace(".layers.2.", ".layers.1."): value for name, value in ours.items()}
    assert named.keys() == theirs.keys()
    assert all(torch.equal(named[name], value) for name, value in theirs.items())


def full(model: Any) -> torch.Tensor:
    """The loss of the same weights without gates."""
    return completion_loss(copy.deepcopy(model), *batch()).loss


def test_checkpointing_changes_nothing() -> None:
    model = lora(model_of()).train()
    plain = completion_loss(model, *batch())
    theirs = gradients(model, plain.loss)
    calls: list[Any] = []
    with checkpointed(model, find_blocks(model)[1], calls.append):
        found = completion_loss(model, *batch())
        ours = gradients(model, found.loss)
    assert len(calls) == LAYERS
    assert torch.equal(found.loss, plain.loss)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_batch_without_targets_has_a_loss_of_zero() -> None:
    model = lora(model_of()).train()
    inputs, labels = batch()
    found = completion_loss(model, inputs, torch.full_like(labels, IGNORED))
    assert (float(found.loss.detach()), found.targets, found.correct) == (0.0, 0, 0)
    assert not any(value.any() for value in gradients(model, found.loss).values())


def test_the_first_token_is_never_a_target() -> None:
    model = model_of()
    inputs, labels = batch()
    labels[:, 0] = inputs["input_ids"][:, 0]
    assert completion_loss(model, inputs, labels).targets == int((labels[:, 1:] >= 0).sum())


def test_the_model_is_left_as_it_was() -> None:
    model = model_of()
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    completion_loss(model, *batch())
    assert model.config.use_cache
    for name, part in model.named_modules():
        assert vars(part).keys() == before[name].keys()
        assert not part._forward_hooks or part is model.get_input_embeddings()


def test_a_head_that_is_trained_is_refused() -> None:
    model = model_of()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(DroppeftError, match="head of this language model is not frozen"):
        completion_loss(model, *batch())
    with torch.no_grad():
        completion_loss(model, *batch())
