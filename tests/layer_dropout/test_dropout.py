"""layer_dropout: the same layers within an optimizer step, and every layer outside training."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from marginals import largest
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import droppeft
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import DrawnGates, find_blocks, gated, layer_dropout, layer_rates
from droppeft.layer_dropout.dropout import modes_of_step
from droppeft.layer_dropout.modes import Mode
from refusals import refused
from tiny import tiny_model

LAYERS = 6
Gates = tuple[bool, ...]


def batch(rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (rows, 5), generator=generator)
    return {"input_ids": ids, "labels": torch.arange(rows) % 2}


def lora_model(model_type: str = "llama", task_type: str | None = "SEQ_CLS") -> Any:
    """Return a classifier of 6 layers with LoRA. Its head is frozen if there is no task type."""
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type=task_type,
        r=2,
        target_modules=["q_proj", "up_proj", "query"],
        init_lora_weights=False,
    )
    return get_peft_model(tiny_model(LAYERS, model_type), lora).train()


@pytest.fixture
def model() -> Any:
    return lora_model()


def adamw(model: Any) -> torch.optim.AdamW:
    trained = [value for value in model.parameters() if value.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)


def adapters(model: Any) -> list[list[torch.nn.Parameter]]:
    """Return the trained tensors of each layer."""
    _, blocks = find_blocks(model)
    return [[value for value in block.parameters() if value.requires_grad] for block in blocks]


def gradients(model: Any) -> list[torch.Tensor | None]:
    return [
        None if value.grad is None else value.grad.clone()
        for value in model.parameters()
        if value.requires_grad
    ]


def assert_same(ours: list[Any], theirs: list[Any], rtol: float = 0.0) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=rtol, atol=rtol)


def test_every_optimizer_step_runs_its_own_layers(model: Any) -> None:
    optimizer = adamw(model)
    seen = []
    with layer_dropout(model, optimizer, 0.5) as dropout:
        for step in range(12):
            assert dropout.step == step
            seen.append(dropout.active)
            before = dropout.executed
            model(**batch()).loss.backward()
            ran = [now - then for now, then in zip(dropout.executed, before, strict=True)]
            assert ran == list(map(int, dropout.active))
            optimizer.step()
            optimizer.zero_grad()
    assert all(sum(active) == 3 and active[0] and active[-1] for active in seen)
    assert len(set(seen)) == 4  # one of the four inner layers runs


def test_a_dropped_layer_is_neither_updated_nor_decayed(model: Any) -> None:
    optimizer = adamw(model)
    with layer_dropout(model, optimizer, 0.5) as dropout:
        for _ in range(4):
            before = [[value.detach().clone() for value in layer] for layer in adapters(model)]
            active = dropout.active
            model(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for runs, then, now in zip(active, before, adapters(model), strict=True):
                assert then
                assert not any(torch.equal(a, b) == runs for a, b in zip(then, now, strict=True))


def test_accumulating_gradients_equals_a_larger_batch(model: Any) -> None:
    optimizer = adamw(model)
    large = batch(8)
    with layer_dropout(model, optimizer, 0.5) as dropout:
        dropout.step = 3
        model(**large).loss.backward()
        at_once = gradients(model)
        assert None in at_once
        model.zero_grad()
        for part in range(4):
            small = {name: value[2 * part : 2 * part + 2] for name, value in large.items()}
            (model(**small).loss / 4).backward()
        assert dropout.step == 3
    assert_same(gradients(model), at_once, rtol=1e-5)


def full_depth(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits.detach()


def evaluating(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    return model(**inputs).logits.detach()


def test_evaluation_inside_runs_every_layer(model: Any) -> None:
    full = full_depth(model, batch())
    with layer_dropout(model, adamw(model), 0.5) as dropout:
        training = model(**batch()).loss
        executed = dropout.executed
        assert torch.equal(evaluating(model, batch()), full)
        assert dropout.executed == tuple(count + 1 for count in executed)
        model.train()
        training.backward()  # not affected by the evaluation in between
        assert not torch.equal(full_depth(model, batch()), full)
    grads = [any(value.grad is not None for value in layer) for layer in adapters(model)]
    assert tuple(grads) == dropout.active


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_forwards_without_gradients_run_the_step_s_layers(
    model: Any, context: Callable[[], Any]
) -> None:
    """As a reference or a loss in two passes must, also as the first forward of a step."""
    with layer_dropout(model, adamw(model), 0.5) as dropout:
        with context():
            before = model(**batch()).logits.clone()
        assert dropout.executed == tuple(map(int, dropout.active))
        assert torch.equal(model(**batch()).logits, before)


def causal_model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).train()


def test_generation_inside_runs_every_layer() -> None:
    model = causal_model()
    ids = torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    full = model.generate(ids, **settings)
    with layer_dropout(model, adamw(model), 0.5) as dropout:
        model(ids, labels=ids).loss.backward()
        executed = dropout.executed
        assert torch.equal(model.generate(ids, **settings), full)
        # One forward for the prompt and the first new token, then one for each further token.
        assert dropout.executed == tuple(count + 6 for count in executed)
    assert model.training


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_recomputes_what_ran(model: Any, reentrant: bool) -> None:
    runs = [0] * LAYERS
    for layer, block in enumerate(find_blocks(model)[1]):

        def count(*_: object, layer: int = layer) -> None:
            runs[layer] += 1

        block.self_attn.register_forward_pre_hook(count)
    with layer_dropout(model, adamw(model), 0.5) as dropout:
        model(**batch()).loss.backward()
        plain = gradients(model)
        model.zero_grad()
        runs[:] = [0] * LAYERS
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(**batch()).loss.backward()
        assert runs == [2 * active for active in dropout.active]
    assert_same(gradients(model), plain)


def by_hand(model: Any, region: str, reentrant: bool | None) -> torch.Tensor:
    """Return the hidden states of a Llama, with blocks checkpointed together."""
    base = model.get_base_model().model
    ids = batch()["input_ids"]
    positions = torch.arange(ids.shape[1])[None]

    def run(hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        rotary = base.rotary_emb(hidden, positions)
        for block in base.layers[first:last]:
            hidden = block(hidden, attention_mask=None, position_embeddings=rotary)
        return hidden

    def nested(hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        middle = (first + last) // 2
        hidden = checkpoint(run, hidden, first, middle, use_reentrant=reentrant)
        return checkpoint(run, hidden, middle, last, use_reentrant=reentrant)

    hidden = base.embed_tokens(ids).detach().requires_grad_()
    size = {"all": LAYERS, "nested": LAYERS, "halves": 3, "pairs": 2}[region]
    for first in range(0, LAYERS, size):
        part = nested if region == "nested" and reentrant is not None else run
        if reentrant is None:
            hidden = part(hidden, first, first + size)
        else:
            hidden = checkpoint(part, hidden, first, first + size, use_reentrant=reentrant)
    return hidden


def nothing(model: Any, dropout: DrawnGates) -> None:
    pass


def evaluation(model: Any, dropout: DrawnGates) -> None:
    """Leaves the model in evaluation mode."""
    with torch.no_grad():
        evaluating(model, batch())


def another_step(model: Any, dropout: DrawnGates) -> None:
    """With two forwards and, before them, evaluation with gradients."""
    evaluating(model, batch())
    model.train()
    dropout.step += 1
    with torch.no_grad():
        model(**batch())
    model(**batch())


@pytest.mark.parametrize("between", [nothing, evaluation, another_step])
@pytest.mark.parametrize("region", ["all", "halves", "pairs", "nested"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_blocks_checkpointed_by_hand_are_recomputed_as_they_ran(
    model: Any, reentrant: bool, region: str, between: Callable[..., None]
) -> None:
    """Whatever runs before and after the forward whose backward recomputes them."""
    with layer_dropout(model, None, 0.5) as dropout:
        by_hand(model, region, None).sum().backward()
        expected = gradients(model)
        model.zero_grad()
        between(model, dropout)
        model.train()
        dropout.step = 0
        hidden = by_hand(model, region, reentrant)
        between(model, dropout)
        hidden.sum().backward()
    assert None in expected
    assert_same(gradients(model), expected)


@pytest.mark.parametrize(
    ("region", "reentrant", "fails"),
    [
        ("halves", True, False),
        ("halves", False, False),
        ("nested", False, False),
        ("nested", True, True),
    ],
)
def test_a_backward_in_another_thread_recomputes_what_ran(
    model: Any, region: str, reentrant: bool, fails: bool
) -> None:
    """As on a GPU, whose threads number the nodes of the graph by themselves."""

    def backward(hidden: torch.Tensor) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(hidden.sum().backward).result()

    with layer_dropout(model, None, 0.5) as dropout:
        by_hand(model, region, None).sum().backward()
        expected = gradients(model)
        for step in range(3):
            another_step(model, dropout)
            model.zero_grad()
            dropout.step = 0
            hidden = by_hand(model, region, reentrant)
            dropout.step = step + 1
            if fails:
                with refused("nested checkpoints on a GPU; use .*use_reentrant=False"):
                    backward(hidden)
            else:
                backward(hidden)
                assert_same(gradients(model), expected)


def test_a_run_can_be_resumed_at_a_step(model: Any) -> None:
    def run(steps: range) -> list[Gates]:
        optimizer = adamw(copied := copy.deepcopy(model))
        seen = []
        with layer_dropout(copied, optimizer, 0.4, sampling="bernoulli", seed=3) as dropout:
            dropout.step = steps.start
            for _ in steps:
                seen.append(dropout.active)
                copied(**batch()).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return seen

    assert run(range(10))[6:] == run(range(6, 10))


SETTINGS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**40),
        "every": st.integers(1, 7),
        "schedule": st.sampled_from(["constant", "warm_up", "recovery"]),
        "total_steps": st.integers(1, 200),
    }
)


def active_in_step(step: int, rates: Sequence[float], options: Any) -> tuple[bool, ...]:
    return tuple(mode is Mode.TRAIN for mode in modes_of_step(step, rates, options))


@given(
    settings=SETTINGS,
    step=st.integers(0, 300),
    mean=st.floats(0, 0.6),
    sampling=st.sampled_from(["exact", "bernoulli"]),
)
def test_gates_depend_on_seed_and_step_and_are_held_for_every_steps(
    settings: dict[str, Any], step: int, mean: float, sampling: str
) -> None:
    rates = layer_rates(mean, "incremental", 10, protected={0, 9})
    options: Any = {"sampling": sampling, **settings}
    active = active_in_step(step, rates, options)
    assert active == active_in_step(step, rates, options)
    first = step - step % settings["every"]
    assert active == active_in_step(first, rates, options)
    assert active[0]
    assert active[9]


def test_consecutive_steps_and_seeds_give_independent_gates() -> None:
    """Layers are dropped at their rates, whatever was dropped for the previous step or seed."""
    rates = (0.1, 0.3, 0.5, 0.5, 0.7, 0.9)
    steps = [active_in_step(step, rates, {"seed": 0}) for step in range(4000)]
    seeds = [active_in_step(0, rates, {"seed": seed}) for seed in range(4000)]
    for draws in (steps, seeds):
        for layer, rate in enumerate(rates):
            pairs = [(then[layer], now[layer]) for then, now in pairwise(draws)]
            # Every other pair, so that pairs are independent: 3 degrees of freedom.
            pairs = pairs[::2]
            share = {True: 1 - rate, False: rate}
            statistic = 0.0
            for a in (True, False):
                for b in (True, False):
                    expected = share[a] * share[b] * len(pairs)
                    statistic += (pairs.count((a, b)) - expected) ** 2 / expected
            assert statistic < largest(degrees=3), (layer, statistic)


def depths(steps: int, **settings: Any) -> Iterator[int]:
    with layer_dropout(lora_model(), None, 0.5, total_steps=steps, **settings) as dropout:
        for step in range(steps):
            dropout.step = step
            yield sum(dropout.active)


def test_a_schedule_changes_the_depth_of_steps() -> None:
    assert list(depths(10, schedule="recovery", schedule_part=0.3)) == [3] * 7 + [6] * 3
    # Gates are drawn at steps 0, 4 and 8; only step 8 is in the last part.
    held = list(depths(10, schedule="recovery", schedule_part=0.3, every=4))
    assert held == [3] * 8 + [6] * 2
    warming = list(depths(10, schedule="warm_up", schedule_part=0.8))
    # 3 of 6 layers are dropped in the end; before, 3 x step / 8, rounded up or down.
    assert all(abs(6 - depth - min(3.0, 3 * s / 8)) < 1 for s, depth in enumerate(warming))
    assert warming[0] == 6
    assert warming[8:] == [3, 3]


def test_steps_beyond_the_end_are_like_the_last() -> None:
    rates = (0.5,) * 4
    settings: dict[str, Any] = {"seed": 0, "schedule": "recovery", "total_steps": 10}
    assert active_in_step(11, rates, settings) == (True,) * 4


@pytest.mark.parametrize(("task_type", "trains_a_head"), [("SEQ_CLS", True), (None, False)])
def test_something_trainable_always_runs(task_type: str | None, trains_a_head: bool) -> None:
    """Bernoulli sampling at rate .9 drops all six layers in half of the steps (.9^6 = .53)."""
    model = lora_model(task_type=task_type)
    with layer_dropout(model, None, rates=[0.9] * 6, sampling="bernoulli") as dropout:
        fewest = LAYERS
        for step in range(40):
            dropout.step = step
            fewest = min(fewest, sum(dropout.active))
            if step < 4:
                model(**batch()).loss.backward()
    assert fewest == (0 if trains_a_head else 1)


def test_only_layers_with_an_adapter_count_as_trainable() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2])
    model = get_peft_model(tiny_model(LAYERS, "llama"), lora)
    with layer_dropout(model, None, rates=[0.9] * 6, sampling="bernoulli") as dropout:
        for step in range(40):
            dropout.step = step
            assert dropout.active[2]


def test_autocast_in_bf16(model: Any) -> None:
    optimizer = adamw(model)
    with layer_dropout(model, optimizer, 0.5) as dropout:
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch()).loss
            loss.backward()
            for runs, layer in zip(dropout.active, adapters(model), strict=True):
                assert all((value.grad is not None) == runs for value in layer)
                assert all(value.grad.isfinite().all() for value in layer if runs)
            optimizer.step()
            optimizer.zero_grad()


OVERFLOW = 2.0**100
"""A loss scale with which fp16 gradients overflow."""


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_is_not_counted(model: Any, fused: bool) -> None:
    """The same layers run again and nothing is updated, with a fused optimizer as well."""
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=OVERFLOW, backoff_factor=2.0**-90)
    steps, moved = [], []
    with layer_dropout(model, optimizer, 0.5) as dropout:
        for _ in range(4):
            before = [[value.detach().clone() for value in layer] for layer in adapters(model)]
            active, executed = dropout.active, dropout.executed
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(**batch()).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ran = tuple(now - then for now, then in zip(dropout.executed, executed, strict=True))
            assert ran == active
            steps.append(dropout.step)
            pairs = zip(before, adapters(model), strict=True)
            moved.append(tuple(not torch.equal(then[0], now[0]) for then, now in pairs))
            assert moved[-1] == ((False,) * LAYERS if len(steps) == 1 else active)
    assert steps == [0, 1, 2, 3]
    # The steps that were taken have the same gates as without a scaler.
    with layer_dropout(model, None, 0.5) as dropout:
        for step, expected in enumerate(moved[1:]):
            dropout.step = step
            assert dropout.active == expected


def test_only_real_steps_of_accelerate_s_optimizer_are_counted(model: Any) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, adamw(model))
    with layer_dropout(model, optimizer, 0.5) as dropout:
        steps = []
        for _ in range(6):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch()).loss)
                optimizer.step()
                optimizer.zero_grad()
            steps.append(dropout.step)
    assert steps == [0, 1, 1, 2, 2, 3]


def test_layers_of_encoder_and_decoder_are_dropped() -> None:
    config = AutoConfig.for_model(
        "t5",
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_heads=2,
        num_layers=6,
        num_decoder_layers=4,
        decoder_start_token_id=0,
    )
    model = AutoModelForSeq2SeqLM.from_config(config).train()
    ids = torch.tensor([[5, 6, 7]])
    with layer_dropout(model, adamw(model), 0.5) as dropout:
        for step in range(20):
            dropout.step = step
            encoder, decoder = dropout.active[:6], dropout.active[6:]
            assert encoder[0]
            assert encoder[-1]
            assert decoder[0]
            assert decoder[-1]
            assert sum(dropout.active) == 5
        model(input_ids=ids, labels=ids).loss.backward()
        assert dropout.executed == tuple(map(int, dropout.active))


def test_nothing_is_left_behind(model: Any) -> None:
    optimizer = adamw(model)
    full = full_depth(model, batch())
    state = list(model.state_dict())

    def hooks() -> list[int]:
        attributes = [len(vars(module)) for module in model.modules()]
        stepping = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        return [*attributes, *map(len, stepping)]

    before = hooks()
    with layer_dropout(model, optimizer, 0.5):
        assert sum(hooks()) > sum(before) + LAYERS
        assert list(model.state_dict()) == state
    assert hooks() == before
    with pytest.raises(RuntimeError, match="mine"), layer_dropout(model, optimizer, 0.5):
        raise RuntimeError("mine")
    assert hooks() == before
    assert all("forward" not in vars(block) for block in find_blocks(model)[1])
    assert torch.equal(full_depth(model, batch()), full)
    with gated(find_blocks(model)[1]):
        pass


def test_zero_gradients_of_a_dropped_layer_are_refused(model: Any) -> None:
    optimizer = adamw(model)
    with layer_dropout(model, optimizer, 0.5) as dropout:
        ran = dropout.active
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        while dropout.active == ran:
            dropout.step += 1
        [layer] = [layer for layer in range(LAYERS) if ran[layer] and not dropout.active[layer]]
        before = [value.detach().clone() for value in adapters(model)[layer]]
        model(**batch()).loss.backward()
        with pytest.raises(DroppeftError, match=f"layer {layer} was dropped, but its gradients"):
            optimizer.step()
        assert_same(before, adapters(model)[layer])


def test_a_gradient_of_a_dropped_layer_is_refused(model: Any) -> None:
    """Here of a forward in evaluation mode, which runs every layer."""
    optimizer = adamw(model)
    with layer_dropout(model, optimizer, 0.5) as dropout:
        layer = dropout.active.index(False)
        model.eval()
        model(**batch()).loss.backward()
        with pytest.raises(DroppeftError, match=f"layer {layer} is dropped in step 0, but has a"):
            optimizer.step()
        assert dropout.step == 0


def test_gradients_of_a_closure_are_checked_after_it(model: Any) -> None:
    """Before it, there are those of the last step."""
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.LBFGS(trained, lr=1e-3, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(**batch()).loss
        loss.backward()
        return loss

    with layer_dropout(model, optimizer, 0.5) as dropout:
        seen = []
        for _ in range(3):
            seen.append(dropout.active)
            optimizer.step(closure)
        assert len(set(seen)) > 1
        model.eval()
        with refused("is dropped in step 3, but has a gradient"):
            optimizer.step(closure)


def test_zero_gradients_of_a_layer_that_ran_are_accepted() -> None:
    """The first gradient of LoRA's A is zero, since B starts at zero."""
    model = get_peft_model(
        tiny_model(LAYERS, "llama"), LoraConfig(r=2, target_modules=["q_proj"])
    ).train()
    optimizer = adamw(model)
    with layer_dropout(model, optimizer, 0.5) as dropout:
        model(**batch()).loss.backward()
        optimizer.step()
        assert dropout.step == 1


@pytest.mark.parametrize("value", [3.0, True, torch.tensor(3.0), np.float64(3), np.bool_(1), "3"])
def test_numbers_that_are_not_whole_are_refused(model: Any, value: Any) -> None:
    """They would give other gates than the number that they equal, as text."""
    with layer_dropout(model, None, 0.5) as dropout:
        with refused("the step is .*; it must be a whole number"):
            dropout.step = value
        assert dropout.step == 0
    options: list[Any] = [{"seed": value}, {"every": value}, {"protect_first": value}]
    for option in options:
        with refused(f"{next(iter(option))} is .*; it must be a whole number"):
            layer_dropout(model, None, 0.5, **option).__enter__()


@pytest.mark.parametrize("three", [torch.tensor(3), np.int64(3), np.uint8(3)])
def test_whole_numbers_of_other_types_are_integers(model: Any, three: Any) -> None:
    def gates(step: Any, **options: Any) -> Gates:
        with layer_dropout(model, None, rates=[0.5] * 6, **options) as dropout:
            dropout.step = step
            assert type(dropout.step) is int
            return dropout.active

    assert gates(three) == gates(3)
    assert gates(9, seed=three, every=three) == gates(9, seed=3, every=3)


class NotATorchOptimizer:
    """Has a step method, but no step hooks."""

    def step(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs either a mean rate or the rates"),
        ({"mean": 0.5, "rates": [0.5] * 6}, "either a mean rate or the rates"),
        ({"rates": [0.5] * 5}, "5 drop rates were given for 6 layers"),
        ({"mean": 0.7}, "the largest possible mean is 0.6666; lower the mean"),
        ({"mean": 0.5, "shape": "round"}, "unknown shape 'round'"),
        ({"mean": 0.5, "sampling": "sometimes"}, "unknown sampling 'sometimes'"),
        ({"mean": 0.5, "protect_last": 9}, "cannot protect 1 first and 9 last layers"),
        ({"mean": 0.5, "every": 0}, "every is 0; it must be 1 or more steps"),
        ({"mean": 0.5, "schedule": "cosine"}, "unknown schedule 'cosine'"),
        ({"mean": 0.5, "schedule_part": 0}, "the part of the run that constant takes is 0"),
        ({"mean": 0.5, "schedule": "recovery"}, "depends on the length of the run; set total_st"),
        ({"mean": 0.5, "schedule": "warm_up", "total_steps": 0}, "the length of the run"),
        (
            {"mean": 0.5, "optimizer": NotATorchOptimizer()},
            "cannot count the steps of NotATorchOptimizer",
        ),
    ],
)
def test_impossible_options_are_refused(model: Any, settings: dict[str, Any], message: str) -> None:
    given = {"optimizer": None, **settings}
    with pytest.raises(DroppeftError, match=re.escape(message)), layer_dropout(model, **given):
        pass
    assert all("forward" not in vars(block) for block in find_blocks(model)[1])


def test_a_step_before_the_first_is_refused(model: Any) -> None:
    with layer_dropout(model, None, 0.5) as dropout:
        with pytest.raises(DroppeftError, match="the step is -1; it must be 0 or more"):
            dropout.step = -1
        assert dropout.step == 0


TORCH_REQUIRES = ["torch", "torchgen", "functorch", "filelock", "typing_extensions.py", "sympy"]
TORCH_REQUIRES += ["mpmath", "networkx", "jinja2", "markupsafe", "fsspec"]
"""In site-packages: torch and what it requires."""

ONLY_TORCH = """
from types import SimpleNamespace

import torch
from torch import nn
from droppeft.layer_dropout import layer_dropout

class BertLayer(nn.Linear):
    pass

class Model(nn.Module):
    config = SimpleNamespace(model_type='bert', num_hidden_layers=4)

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(BertLayer(2, 2) for _ in range(4))

    def forward(self, hidden):
        for block in self.encoder.layer:
            hidden = block(hidden)
        return hidden

model = Model()
optimizer = torch.optim.AdamW(model.parameters())
with layer_dropout(model, optimizer, mean=0.5) as dropout:
    for _ in range(10):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
print(dropout.step, sum(dropout.executed))
"""


def test_it_works_if_only_torch_is_installed(tmp_path: Path) -> None:
    """The process sees a folder with links to these packages instead of site-packages."""
    installed = Path(torch.__file__).parents[1]
    for name in TORCH_REQUIRES:
        (tmp_path / name).symlink_to(installed / name)
    (tmp_path / "droppeft").symlink_to(Path(droppeft.__file__).parent)
    program = f"{ONLY_TORCH}\nimport importlib.util\nprint(importlib.util.find_spec('numpy'))"
    result = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    assert result.stdout.split() == ["10", "20", "None"]
