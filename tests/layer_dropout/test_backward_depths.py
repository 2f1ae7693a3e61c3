"""Truncated backward in a training loop: exact outputs, and gradients down to a drawn depth."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from droppeft.layer_dropout import Mode, layer_dropout
from droppeft.layer_dropout.stacks import find_stacks
from refusals import refused
from tiny import tiny_model

LAYERS = 6
DEPTHS = (1, 0.67, 0.33)
IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])


def adapted(model: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    targets = ["q_proj", "query", "q", "attn.q"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **settings)
    return get_peft_model(model, lora).train()


def classifier(model_type: str = "llama", **settings: Any) -> Any:
    return adapted(tiny_model(LAYERS, model_type), **{"task_type": "SEQ_CLS", **settings})


def mpnet() -> Any:
    """Its blocks return tuples."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40}
    config = AutoConfig.for_model("mpnet", num_hidden_layers=LAYERS, num_attention_heads=2, **sizes)
    return adapted(AutoModelForSequenceClassification.from_config(config), task_type="SEQ_CLS")


def seq2seq(model_type: str) -> Any:
    torch.manual_seed(0)
    sizes = {
        "bart": {"encoder_layers": 3, "decoder_layers": 3, "d_model": 16},
        "t5": {"num_layers": 3, "num_decoder_layers": 3, "d_model": 16},
    }[model_type]
    config = AutoConfig.for_model(model_type, vocab_size=40, decoder_start_token_id=0, **sizes)
    return adapted(AutoModelForSeq2SeqLM.from_config(config))


def loss_of(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    labels = IDS if model.config.is_encoder_decoder else IDS[:, 0] % 2
    loss: torch.Tensor = model(input_ids=IDS, labels=labels).loss
    return loss


def gradients(model: Any) -> list[list[torch.Tensor | None]]:
    """Of the trained tensors of each layer."""
    blocks = [block for stack in find_stacks(model).values() for block in stack]
    return [
        [None if v.grad is None else v.grad.clone() for v in block.parameters() if v.requires_grad]
        for block in blocks
    ]


MODELS: dict[str, Callable[[], Any]] = {
    "llama": classifier,
    "bert": lambda: classifier("bert"),
    "mpnet": mpnet,
    "bart": lambda: seq2seq("bart"),
    "t5": lambda: seq2seq("t5"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_loss_and_upper_gradients_of_the_plain_model(name: str) -> None:
    model = MODELS[name]()
    plain = loss_of(model)
    plain.backward()  # type: ignore[no-untyped-call]
    expected = gradients(model)
    seen = set()
    with layer_dropout(model, None, backward_depths=DEPTHS) as dropout:
        for step in range(8):
            model.zero_grad()
            dropout.step = step
            loss = loss_of(model)
            loss.backward()  # type: ignore[no-untyped-call]
            dropout.check_gradients()
            assert torch.equal(loss, plain)
            start = dropout.modes.index(Mode.TRAIN)
            assert dropout.modes == (Mode.FORWARD,) * start + (Mode.TRAIN,) * (LAYERS - start)
            seen.add(start)
            for layer, (full, found) in enumerate(zip(expected, gradients(model), strict=True)):
                for one, other in zip(full, found, strict=True):
                    trained = layer >= start and one is not None
                    assert torch.equal(one, other) if trained else other is None, (layer, start)
    assert seen == {0, 2, 4}


def test_a_step_changes_only_the_layers_that_it_trains() -> None:
    """Whatever their momentum and weight decay; and a lower layer may be skipped as well."""
    model = classifier()
    values = [v for v in model.parameters() if v.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=1e-2, weight_decay=0.5)
    blocks = find_stacks(model)["base_model.model.model.layers"]
    modes = set()
    with layer_dropout(model, optimizer, 0.34, backward_depths=(1, 0.5)) as dropout:
        for _ in range(8):
            before = [[v.detach().clone() for v in b.parameters()] for b in blocks]
            drawn = dropout.modes
            modes.update(drawn)
            loss_of(model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            for block, old, mode in zip(blocks, before, drawn, strict=True):
                new = list(block.parameters())
                changed = any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
                assert changed == (mode is Mode.TRAIN)
    assert modes == {Mode.TRAIN, Mode.FORWARD, Mode.SKIP}


def test_evaluation_runs_plainly() -> None:
    model = classifier()
    with layer_dropout(model, None, backward_depths=(0.5,)) as dropout:
        model.eval()
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        assert all(value is not None for layer in gradients(model) for value in layer)
        with refused("layer 0 is run forward only in step 0, but has a gradient"):
            dropout.check_gradients()


def test_a_step_that_would_train_nothing_is_refused() -> None:
    model = classifier(task_type=None, layers_to_transform=[0, 1])
    with (
        refused("from 3 on would train nothing, since only layers up to 1 have trained"),
        layer_dropout(model, None, backward_depths=(0.5,)),
    ):
        pass


def test_virtual_tokens_are_refused() -> None:
    prompt = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = get_peft_model(tiny_model(LAYERS, "bert"), prompt)
    with layer_dropout(model, None, 0.0, backward_depths=(1.0,)):
        pass
    with (
        refused("backward_depths below 1 need an adapter inside the layers"),
        layer_dropout(model, None, backward_depths=(1.0, 0.5)),
    ):
        pass


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        (0.5, r"backward_depths is 0.5; give a list of fractions"),
        (("half",), "backward_depths is .*half.*; give a list of fractions"),
        ((), "each must be above 0 and at most 1"),
        ((1, 0), "each must be above 0 and at most 1"),
        ((float("nan"),), "each must be above 0 and at most 1"),
    ],
)
def test_what_are_no_depths_is_refused(depths: Any, message: str) -> None:
    with refused(message), layer_dropout(classifier(), None, 0.0, backward_depths=depths):
        pass
