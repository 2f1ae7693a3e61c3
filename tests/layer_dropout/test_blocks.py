"""A gated model computes exactly the same as a model without the dropped blocks."""

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks, gated, layer_dropout
from droppeft.layer_dropout.modes import Mode
from refusals import refused

Batch = dict[str, torch.Tensor]
LAYERS = 4
LOWER_HALF = (Mode.FORWARD, Mode.FORWARD, Mode.TRAIN, Mode.TRAIN)


def step(model: nn.Module, batch: Batch, seed: int = 3) -> tuple[torch.Tensor, list[Any]]:
    """Forward and backward; return the logits and a copy of every gradient."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return output.logits.detach(), gradients


def assert_same(one: tuple[torch.Tensor, list[Any]], other: tuple[torch.Tensor, list[Any]]) -> None:
    assert torch.equal(one[0], other[0])
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


def shallow(model: PreTrainedModel, active: tuple[bool, ...]) -> PreTrainedModel:
    """Return a new model that has only the active blocks, with their weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = sum(active)
    small = AutoModelForSequenceClassification.from_config(config)
    name, _ = find_blocks(model)
    remaining = [layer for layer, runs in enumerate(active) if runs]
    moved = {f"{name}.{old}.": f"{name}.{new}." for new, old in enumerate(remaining)}
    weights = {}
    for key, value in model.state_dict().items():
        if not key.startswith(f"{name}."):
            weights[key] = value
        for old, new in moved.items():
            if key.startswith(old):
                weights[new + key.removeprefix(old)] = value
    small.load_state_dict(weights)
    return small.eval()


def patterns() -> Iterator[tuple[bool, ...]]:
    """Yield all gates except all open and all closed."""
    for number in range(1, 2**LAYERS - 1):
        yield tuple(bool(number >> layer & 1) for layer in range(LAYERS))


def test_all_active_is_the_plain_model(model: PreTrainedModel, batch: Batch) -> None:
    model.train()
    plain = step(model, batch)
    after_plain = torch.get_rng_state()
    _, blocks = find_blocks(model)
    with gated(blocks) as gates:
        assert gates.active == (True,) * LAYERS
        assert_same(step(model, batch), plain)
        assert gates.executed == (1,) * LAYERS
    assert torch.equal(torch.get_rng_state(), after_plain)


def test_blocks_that_run_forward_only_change_nothing_above_them(
    model: PreTrainedModel, batch: Batch
) -> None:
    model.train()
    _, blocks = find_blocks(model)
    logits, gradients = step(model, batch)
    with gated(blocks) as gates:
        gates.modes = LOWER_HALF
        found, now = step(model, batch)
        assert (gates.executed, gates.active) == ((1,) * LAYERS, (True,) * LAYERS)
    assert torch.equal(found, logits)
    assert_upper_half(model, blocks, gradients, now)


def assert_upper_half(
    model: nn.Module, blocks: Sequence[nn.Module], full: list[Any], found: list[Any]
) -> None:
    """The two upper blocks have the gradients of the plain model, and the lower ones have none."""
    lower, upper = ({v for b in part for v in b.parameters()} for part in (blocks[:2], blocks[2:]))
    for value, expected, gradient in zip(model.parameters(), full, found, strict=True):
        if value in upper:
            assert_same((torch.zeros(1), [gradient]), (torch.zeros(1), [expected]))
        assert value not in lower or gradient is None


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_checkpointed_blocks_that_run_forward_only(
    build: Callable[..., PreTrainedModel], batch: Batch, name: str, reentrant: bool
) -> None:
    """A reentrant checkpoint has gradients only if its input requires one. Neither the modes of a
    later forward nor those after it affect a backward."""
    model = build(name).train()
    _, blocks = find_blocks(model)
    _, full = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with gated(blocks) as gates:
        gates.modes = LOWER_HALF
        torch.manual_seed(3)
        model.zero_grad()
        loss = model(**batch).loss
        gates.modes = (Mode.TRAIN,) * LAYERS
        loss.backward()
        assert gates.executed == (1,) * LAYERS
    assert_upper_half(model, blocks, full, [value.grad for value in model.parameters()])


def test_a_shared_weight_has_a_gradient_under_autocast(
    build: Callable[..., PreTrainedModel], batch: Batch
) -> None:
    """Autocast may not reuse the copy that a block has cast which runs forward only."""
    model = build("llama").train()
    _, blocks = find_blocks(model)
    shared = blocks[3].mlp.down_proj.weight = blocks[0].mlp.down_proj.weight
    with gated(blocks) as gates:
        gates.modes = LOWER_HALF
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    assert shared.grad is not None


def test_a_block_below_one_that_runs_forward_only_cannot_be_trained(
    build: Callable[..., PreTrainedModel],
) -> None:
    with gated(find_blocks(build("bert"))[1]) as gates:
        with refused("block 1 cannot be trained below block 2, which runs forward only"):
            gates.modes = (Mode.SKIP, Mode.TRAIN, Mode.FORWARD, Mode.TRAIN)
        with refused("3 gates were set for 4 blocks"):
            gates.modes = (Mode.TRAIN,) * 3
        assert gates.modes == (Mode.TRAIN,) * LAYERS


def test_dropping_blocks_equals_a_model_without_them(
    model: PreTrainedModel, batch: Batch, architecture: str
) -> None:
    model.eval()
    _, blocks = find_blocks(model)
    full = model(**batch).logits
    for active in patterns():
        if architecture == "deberta-v2-conv" and not active[0]:
            continue  # in the small model, the convolution would follow another block
        small = shallow(model, active)
        with gated(blocks) as gates, torch.no_grad():
            gates.active = active
            logits = model(**batch).logits
        assert torch.equal(logits, small(**batch).logits), active
        assert not torch.equal(logits, full), active


def test_the_convolution_of_a_dropped_block_0_still_runs(
    build: Callable[..., PreTrainedModel], batch: Batch
) -> None:
    model = build("deberta-v2-conv").eval()
    _, blocks = find_blocks(model)
    pairs = []
    model.deberta.encoder.conv.register_forward_hook(lambda _, args, __: pairs.append(args))
    with gated(blocks) as gates:
        gates.active = (False, True, True, True)
        model(**batch)
    [(hidden, block_output, _)] = pairs
    assert block_output is hidden


def test_a_dropped_block_returns_its_input_object(model: PreTrainedModel, batch: Batch) -> None:
    _, blocks = find_blocks(model)
    seen: list[tuple[torch.Tensor, Any]] = []
    for block in blocks:
        block.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with gated(blocks) as gates:
        gates.active = (False, True, False, True)
        model(**batch)
    arities = {isinstance(output, tuple) and len(output) for _, output in seen}
    assert len(arities) == 1
    for (given, output), runs in zip(seen, gates.active, strict=True):
        returned = output[0] if isinstance(output, tuple) else output
        assert (returned is given) == (not runs)


def test_all_blocks_can_be_dropped(model: PreTrainedModel, batch: Batch) -> None:
    _, blocks = find_blocks(model)
    with gated(blocks) as gates:
        gates.active = (False,) * LAYERS
        step(model, batch)
        assert gates.executed == (0,) * LAYERS
    assert all(p.grad is None for block in blocks for p in block.parameters())


def test_dropped_blocks_get_no_gradient_and_do_not_decay(
    model: PreTrainedModel, batch: Batch
) -> None:
    _, blocks = find_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    with gated(blocks) as gates:
        # There is momentum from the first step in the second and third.
        for active in [(True,) * 4, (True, False, True, False), (True, True, False, False)]:
            gates.active = active
            before = [[p.detach().clone() for p in block.parameters()] for block in blocks]
            step(model, batch)
            gradients = [[p.grad for p in block.parameters()] for block in blocks]
            optimizer.step()
            for block, old, grads, runs in zip(blocks, before, gradients, active, strict=True):
                assert all((grad is not None) == runs for grad in grads)
                for parameter, value in zip(block.parameters(), old, strict=True):
                    assert torch.equal(parameter, value) != runs


def test_names_and_state_do_not_change(model: PreTrainedModel, batch: Batch) -> None:
    def names() -> tuple[list[str], list[str], list[str]]:
        modules = [f"{name} {type(module)}" for name, module in model.named_modules()]
        return modules, [name for name, _ in model.named_parameters()], list(model.state_dict())

    before = names()
    attributes = [set(vars(block)) for block in find_blocks(model)[1]]
    with gated(find_blocks(model)[1]) as gates:
        gates.active = (False, True, True, False)
        model(**batch)
        assert names() == before
    assert names() == before
    assert [set(vars(block)) for block in find_blocks(model)[1]] == attributes


def test_evaluation_outside_runs_every_layer(model: PreTrainedModel, batch: Batch) -> None:
    model.eval()
    _, blocks = find_blocks(model)
    full = model(**batch).logits
    with gated(blocks) as gates:
        gates.active = (False, True, False, False)
        model(**batch)
    assert torch.equal(model(**batch).logits, full)


def test_an_exception_inside_removes_the_gates(model: PreTrainedModel) -> None:
    _, blocks = find_blocks(model)
    with pytest.raises(RuntimeError, match="mine"), gated(blocks):
        raise RuntimeError("mine")
    assert all("forward" not in vars(block) for block in blocks)


def test_a_forward_that_another_tool_has_set_is_restored(model: PreTrainedModel) -> None:
    _, blocks = find_blocks(model)
    theirs = blocks[1].forward
    vars(blocks[1])["forward"] = theirs
    with gated(blocks):
        assert blocks[1].forward is not theirs
    assert blocks[1].forward is theirs


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def saved(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, saved])
def test_a_copy_has_no_gates(
    build: Callable[..., PreTrainedModel], batch: Batch, make_copy: Callable[[nn.Module], nn.Module]
) -> None:
    """Neither the copy nor a copy of the copy; and the original keeps its gates."""
    model = build("bert").train()
    expected = step(model, batch)
    original = [set(vars(module)) for module in model.modules()]
    with layer_dropout(model, None, rates=[1.0] * LAYERS) as dropout:
        inside = [set(vars(module)) for module in model.modules()]
        for copied in (make_copy(model), make_copy(make_copy(model))):
            assert [set(vars(module)) for module in copied.modules()] == original
            assert_same(step(copied, batch), expected)
        assert dropout.executed == (0,) * LAYERS
        assert [set(vars(module)) for module in model.modules()] == inside
    assert_same(step(model, batch), expected)


def test_a_checkpoint_that_is_saved_inside_is_the_model_s(
    build: Callable[..., PreTrainedModel], batch: Batch, tmp_path: Path
) -> None:
    model = build("bert").eval()
    with layer_dropout(model, None, 0.5):
        model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_data_parallel_is_refused(build: Callable[..., PreTrainedModel]) -> None:
    """Its copies share the attributes of the original, and so would run the original's weights."""
    _, blocks = find_blocks(build("bert"))
    with gated(blocks), refused("cannot be dropped in the copies .* that DataParallel makes"):
        blocks[0]._replicate_for_data_parallel()
    blocks[0]._replicate_for_data_parallel()


def test_a_model_s_own_layerdrop_is_off_inside() -> None:
    """In copies it is as it was."""
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16, "vocab_size": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    drops = {"encoder_layerdrop": 0.25, "decoder_layerdrop": 0.5}
    config = AutoConfig.for_model("bart", **sizes, **heads, **drops)
    model = AutoModel.from_config(config)

    def rates(model: Any) -> tuple[float, float]:
        return model.encoder.layerdrop, model.decoder.layerdrop

    with layer_dropout(model, None, 0.0):
        assert rates(model) == (0.0, 0.0)
        assert rates(copy.deepcopy(model)) == (0.25, 0.5)
    assert rates(model) == (0.25, 0.5)


def test_gating_twice_is_refused(build: Callable[..., PreTrainedModel]) -> None:
    _, blocks = find_blocks(build("bert"))
    with gated(blocks[:2]) as gates:
        with pytest.raises(DroppeftError, match="is gated already"), gated(blocks):
            pass
        assert "forward" not in vars(blocks[3])
        gates.active = (False, True)
    with pytest.raises(DroppeftError, match="twice"), gated([blocks[0], blocks[0]]):
        pass
    with gated(blocks):
        pass


@pytest.mark.parametrize("number", [3, 5])
def test_a_wrong_number_of_gates_is_refused(
    build: Callable[..., PreTrainedModel], number: int
) -> None:
    with gated(find_blocks(build("bert"))[1]) as gates:
        with pytest.raises(DroppeftError, match=f"{number} gates were set for 4 blocks"):
            gates.active = (False,) * number
        assert gates.active == (True,) * LAYERS


def test_executed_forwards_are_counted(model: PreTrainedModel, batch: Batch) -> None:
    with gated(find_blocks(model)[1]) as gates:
        gates.active = (False, True, True, False)
        model(**batch)
        gates.active = (False, True, False, True)
        model(**batch)
        assert gates.executed == (0, 2, 1, 1)
        gates.reset_executed()
        model(**batch)
        assert gates.executed == (0, 1, 0, 1)


@pytest.fixture
def unknown_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the classes of the blocks unknown, as those of a custom model."""
    monkeypatch.setattr("droppeft.layer_dropout.blocks.BLOCK_OUTPUTS", {})


@pytest.mark.usefixtures("unknown_classes")
def test_finding_out_what_blocks_return_has_no_side_effects(
    model: PreTrainedModel, batch: Batch
) -> None:
    model.train()
    _, blocks = find_blocks(model)
    active = (False, True, False, True)
    with gated(blocks) as gates:
        model(**batch)  # all blocks run, so what they return is known afterwards
        gates.active = active
        known = step(model, batch)
        after_known = torch.get_rng_state()
    with gated(blocks) as gates:
        gates.active = active
        assert_same(step(model, batch), known)
        assert torch.equal(torch.get_rng_state(), after_known)
        assert gates.executed == (0, 1, 0, 1)


@pytest.mark.usefixtures("unknown_classes")
def test_a_dropped_block_runs_at_most_once_to_find_out_what_it_returns(
    model: PreTrainedModel, batch: Batch
) -> None:
    _, blocks = find_blocks(model)
    calls = []
    for index, block in enumerate(blocks):
        first = next(block.children())
        first.register_forward_hook(lambda *_, index=index: calls.append(index))
    with gated(blocks) as gates:
        gates.active = (False,) * LAYERS
        model(**batch)
        model(**batch)
    assert calls == [0]


@pytest.mark.usefixtures("unknown_classes")
def test_a_probe_under_autocast_does_not_lose_gradients(
    build: Callable[..., PreTrainedModel], batch: Batch
) -> None:
    model = build("deberta-v3")
    _, blocks = find_blocks(model)
    with gated(blocks) as gates, torch.autocast("cpu", dtype=torch.bfloat16):
        gates.active = (False, True, True, True)
        first = model(**batch).loss
        gates.active = (True,) * LAYERS
        second = model(**batch).loss
    (first + second).backward()
    assert all(p.grad is not None for p in blocks[0].parameters())


def test_a_peft_model_is_gated_like_a_plain_one(model: PreTrainedModel, batch: Batch) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="SEQ_CLS", target_modules="all-linear", r=2, init_lora_weights=False
    )
    wrapped = get_peft_model(model, lora).train()
    _, blocks = find_blocks(wrapped)
    plain = step(wrapped, batch)
    with gated(blocks) as gates:
        assert_same(step(wrapped, batch), plain)
        gates.active = (False, True, False, True)
        step(wrapped, batch)
        for block, runs in zip(blocks, gates.active, strict=True):
            adapters = [p for p in block.parameters() if p.requires_grad]
            assert adapters
            assert all((p.grad is not None) == runs for p in adapters)
    assert_same(step(wrapped, batch), plain)


def test_training_with_random_gates_is_reproducible(model: PreTrainedModel, batch: Batch) -> None:
    def train() -> list[torch.Tensor]:
        copied = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(copied.parameters(), lr=1e-3)
        rng = random.Random(1)
        with gated(find_blocks(copied)[1]) as gates:
            for number in range(4):
                gates.active = [rng.random() < 0.5 for _ in range(LAYERS)]
                step(copied, batch, seed=number)
                optimizer.step()
        return list(copied.parameters())

    assert all(map(torch.equal, train(), train()))
