"""Counts with fake tensors equal those of real models, in FLOPs and bytes."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import AutoConfig

from droppeft.adapters.attach import attach
from droppeft.adapters.by_layer import count_parameters, trainable_by_layer
from droppeft.adapters.training_mode import set_training_mode
from droppeft.config import AdapterConfig
from droppeft.costs.fake_step import FakeModel, count_step
from droppeft.costs.modelled_clock import Arithmetic, training_flops
from droppeft.costs.operation_counter import OperationCounter
from droppeft.costs.step_counts import StepCounts
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.layer_dropout import Mode, find_blocks, gated
from droppeft.layer_dropout.modes import Modes
from droppeft.messages.instruction import AdapterSpec
from droppeft.models.key_value_cache import without_cache
from droppeft.models.loading import LAST_MODULES
from droppeft.models.precision import DTYPES, autocast, hold_in
from droppeft.models.quantization import patch_quantised_layers, quantised
from droppeft.tasks.registry import task_named
from droppeft.training.activation_memory import ActivationMeter
from droppeft.training.checkpointing import Call, checkpointed
from droppeft.training.loop import computing_in
from handmade import COST, step_flops, step_stored_bytes
from tiny import FAMILIES

LAYERS, ROWS, LENGTH = 4, 3, 9
ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: (
        sdpa_flop_count(*shapes[:3])
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: (
        sdpa_backward_flop_count(*shapes[:4])
    ),
}
"""torch's formulas for attention, of which it has none on CPUs."""
MORE: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": LAYERS},
    "electra": {"embedding_size": 32},
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen2": {"num_key_value_heads": 1},
}
FEW: dict[str, Any] = {"num_key_value_heads": 2, "max_position_embeddings": 64}


def config_of(model_type: str, layers: int = LAYERS) -> Any:
    sizes = {**FEW, **FAMILIES.get(model_type, {}), **MORE.get(model_type, {})}
    return AutoConfig.for_model(
        model_type,
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        **sizes,
    )


def spec_of(layers: int = LAYERS, frozen: int = 0, **adapter: Any) -> AdapterSpec:
    return adapter_spec(AdapterConfig.model_validate(adapter), layers, frozen)


def real(
    config: Any,
    spec: AdapterSpec,
    quantization: str = "none",
    task: str = "classification",
    precision: str = "fp32",
) -> nn.Module:
    kind = task_named(task)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain: Any = kind.auto_class.from_config(config)
    plain = quantised(plain, quantization, kind.heads)
    patch_quantised_layers(plain)
    hold_in(plain, DTYPES[precision], () if kind.generates else LAST_MODULES)
    model = attach(plain, spec, find_blocks(plain)[0], 0, task_type=kind.adapter_task)
    set_training_mode(model, backbone_dropout=False)
    return model


def batch(fake: FakeModel, rows: int = ROWS, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Like :meth:`FakeModel.batch`, with values and padding."""
    ids = torch.arange(rows * length).view(rows, length) % 50 + 1
    mask = torch.ones_like(ids)
    mask[1:, -1:] = 0
    if "positions" in (made := fake.task.sample_batch(rows, length)):
        return {**made, "input_ids": ids, "attention_mask": mask}
    columns = {name: torch.zeros_like(ids) for name in fake.task.inputs}
    return {**columns, "input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


def patterns(layers: int = LAYERS, frozen: int = 0) -> Iterator[tuple[bool, ...]]:
    """Gates of a full step, and others with at least two layers after the frozen ones."""
    yield (True,) * layers
    rng = random.Random(7)
    for _ in range(3):
        running = rng.sample(range(frozen, layers), k=rng.randint(2, layers - frozen))
        yield tuple(index in running for index in range(layers))


@contextmanager
def stepping(
    model: nn.Module,
    active: Sequence[bool] | Modes,
    precision: str = "fp32",
    checkpointing: Any = None,
) -> Iterator[None]:
    _, blocks = find_blocks(model)
    recomputing = checkpointed(model, blocks, checkpointing) if checkpointing else nullcontext()
    half = computing_in(precision, model, torch.device("cpu"))
    with without_cache(model), half, recomputing, gated(blocks) as gates:
        if isinstance(active[0], Mode):
            gates.modes = active
        else:
            gates.active = active
        yield
    model.zero_grad()


def measured(
    fake: FakeModel, model: nn.Module, active: Sequence[bool] | Modes, precision: str = "fp32"
) -> tuple[int, int]:
    """FLOPs and stored bytes of a real step."""
    meter, flops = ActivationMeter(model), FlopCounterMode(display=False, custom_mapping=ON_CPU)
    with stepping(model, active, precision), flops:
        with autocast(precision, torch.device("cpu")), meter.measuring():
            loss = fake.task.loss(model, batch(fake))
        loss.backward()
    return flops.get_total_flops(), meter.peak_bytes


TASK = "classification"

CASES = [
    *((family, {}, "fp32", 0) for family in (*FAMILIES, *MORE) if family != "distilbert"),
    ("distilbert", {"targets": ["q_lin", "v_lin"]}, "fp32", 0),
    *((family, {}, "bf16", 1) for family in ("bert", "deberta-v2", "llama", "gpt2")),
    ("bert", {"type": "ia3"}, "fp32", 0),
    ("bert", {"type": "bottleneck"}, "bf16", 2),
    ("bert", {"type": "prefix_tuning"}, "fp32", 0),
    ("bert", {"type": "prompt_tuning"}, "fp32", 0),
    ("bert", {"type": "boft", "options": {"boft_block_size": 4}}, "fp32", 0),
    ("llama", {"type": "loha"}, "fp32", 0),
    ("llama", {"type": "prefix_tuning"}, "bf16", 0),
    ("llama", {"targets": ["all-linear"], "dropout": 0.1}, "fp32", 2),
    ("roberta", {"targets": ["all-linear"], "dropout": 0.1}, "fp16", 0),
]


@pytest.mark.sample("bert-*-bf16-*", "bert-adapter0-*", "llama-*-bf16-1", "deberta-v2-*-fp32-*")
@pytest.mark.parametrize(("family", "adapter", "precision", "frozen"), CASES)
def test_a_real_step_has_the_counted_costs(
    family: str, adapter: dict[str, Any], precision: str, frozen: int
) -> None:
    config, spec = config_of(family), spec_of(frozen=frozen, **adapter)
    fake = FakeModel(config, TASK, spec, precision=precision)
    model = real(config, spec, precision=precision)
    counts = count_step(fake, ROWS, LENGTH)
    for active in patterns(frozen=frozen):
        if family == "gemma3_text" and active not in SOME_OF_BOTH_KINDS:
            continue
        flops, stored = measured(fake, model, active, precision)
        if family != "mixtral":  # torch has no formula for experts
            assert flops == step_flops(counts, active), active
        assert stored == step_stored_bytes(counts, active), active


@pytest.mark.sample("bert-fp32", "llama-bf16")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_truncated_step_has_the_modelled_costs(family: str, precision: str) -> None:
    """Layers that run forward only have no backward, and nothing of them is stored."""
    fake = FakeModel(config_of(family), TASK, spec_of(), precision=precision)
    model = real(config_of(family), spec_of(), precision=precision)
    counts, tokens = count_step(fake, ROWS, LENGTH), ROWS * LENGTH
    bytes_at = []
    for start in range(LAYERS):
        modes = (Mode.FORWARD,) * start + (Mode.TRAIN,) * (LAYERS - start)
        flops, stored = measured(fake, model, modes, precision)
        cost = replace(
            COST,
            rows=ROWS,
            tokens=tokens,
            layer_tokens=tuple(tokens * (mode is Mode.TRAIN) for mode in modes),
            forward_tokens=tuple(tokens * (mode is Mode.FORWARD) for mode in modes),
        )
        assert training_flops(Arithmetic((counts,)), cost) == pytest.approx(flops, rel=1e-9)
        assert stored == step_stored_bytes(counts, [mode is Mode.TRAIN for mode in modes])
        bytes_at.append(stored)
    assert bytes_at == sorted(set(bytes_at), reverse=True)


CAUSAL = [
    ("llama", "fp32", "none"),
    ("llama", "bf16", "4bit"),
    ("llama", "fp32", "8bit"),
    ("llama", "bf16", "none"),
    ("gpt2", "fp32", "none"),
    ("qwen2", "bf16", "none"),
    ("gemma3_text", "fp32", "none"),
]


@pytest.mark.sample("llama-*-4bit", "llama-bf16-none")
@pytest.mark.parametrize(("family", "precision", "quantization"), CAUSAL)
def test_a_real_step_of_a_language_model_has_the_counted_costs(
    family: str, precision: str, quantization: str
) -> None:
    """FLOPs of quantised weights are not compared, since torch does not count those of a kernel."""
    config, spec = config_of(family), spec_of()
    fake = FakeModel(config, "causal_lm", spec, (), quantization, precision=precision)
    model = real(config, spec, quantization, "causal_lm", precision)
    counts = count_step(fake, ROWS, LENGTH)
    assert all_weights(counts) == sum(map(bytes_of, [*model.parameters(), *model.buffers()]))
    for active in SOME_OF_BOTH_KINDS:
        flops, stored = measured(fake, model, active, precision)
        assert stored == step_stored_bytes(counts, active), active
        if quantization == "none":
            assert flops == step_flops(counts, active), active


SOME_OF_BOTH_KINDS = [(True,) * 4, (True, True, True, False), (False, True, True, True)]


def test_flops_of_a_bert_by_hand() -> None:
    """A multiply-add is two FLOPs. A layer multiplies, per token, by four maps (H, H)
    and two of H x 2H (8 H² in all), and by LoRA's two maps of H x 8 on query and value (4·8·H);
    attention multiplies queries with keys and weights with values, S² H each per row.

    In the backward a frozen map has one product, for its input, and a trained one has two. Each
    product of attention has two, and one is repeated, since torch does not store the weights."""
    config = config_of("bert")
    counts = count_step(FakeModel(config, TASK, spec_of()), ROWS, LENGTH)
    tokens, h = ROWS * LENGTH, 32
    maps, attention = 2 * tokens * 8 * h * h, 2 * ROWS * 2 * LENGTH**2 * h
    lora = 2 * tokens * 2 * 2 * 8 * h
    for block in counts.blocks:
        assert block.forward_flops == maps + attention + lora
        assert block.backward_flops == maps + 2.5 * attention + 2 * lora
    assert counts.rest.forward_flops == 2 * ROWS * (h * h + h * 2)  # pooler and classifier


def test_what_the_lowest_layer_saves_is_subtracted_from_the_rest() -> None:
    """Nothing below it is trained. So there is no gradient for the input of query, key and value
    (three frozen maps of H x H and two of LoRA's H x 8). In the rest, classifier and pooler have a
    backward."""
    counts = count_step(FakeModel(config_of("bert"), TASK, spec_of()), ROWS, LENGTH)
    tokens, h = ROWS * LENGTH, 32
    saved = 2 * tokens * (3 * h * h + 2 * 8 * h)
    assert counts.rest.backward_flops == 2 * ROWS * (h * h + 2 * h * 2) - saved


@pytest.mark.sample("bert-4bit")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_quantised_models_have_the_counted_bytes(family: str, quantization: str) -> None:
    """FLOPs are not compared, since torch does not count those of a 4-bit kernel."""
    config, spec = config_of(family), spec_of()
    for precision in ("fp32", "bf16"):
        fake = FakeModel(config, TASK, spec, (), quantization, precision=precision)
        model = real(config, spec, quantization, precision=precision)
        counts = count_step(fake, ROWS, LENGTH)
        weights = sum(map(bytes_of, [*model.parameters(), *model.buffers()]))
        assert all_weights(counts) == weights
        for active in patterns():
            _, stored = measured(fake, model, active, precision)
            # Bytes of storages that are freed and used again are measured once.
            assert stored == pytest.approx(step_stored_bytes(counts, active), rel=0.005), active
    plain = count_step(FakeModel(config, TASK, spec), ROWS, LENGTH)
    quantised_flops = count_step(FakeModel(config, TASK, spec, (), quantization), ROWS, LENGTH)
    assert step_flops(quantised_flops, (True,) * LAYERS) == step_flops(plain, (True,) * LAYERS)


def test_a_dequantised_weight_is_a_temporary_tensor() -> None:
    """With two tokens the largest map, (32, 64) in fp32, is most of the temporary bytes."""
    config, spec = config_of("bert"), spec_of()
    small, plain = (FakeModel(config, TASK, spec, (), bits) for bits in ("8bit", "none"))
    more = count_step(small, 1, 2).passing_bytes - count_step(plain, 1, 2).passing_bytes
    assert 0.7 * 32 * 64 * 4 < more <= 32 * 64 * 4


def all_weights(counts: StepCounts) -> int:
    return sum(part.weight_bytes for part in (*counts.blocks, counts.rest))


def bytes_of(value: Any) -> int:
    """Bytes of a tensor, including what bitsandbytes stores besides its codes."""
    extra = []
    if type(value).__name__ == "Int8Params":
        extra = [value.SCB]
    if type(value).__name__ == "Params4bit":
        state = value.quant_state
        extra = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return int(value.nbytes + sum(each.nbytes for each in extra))


@pytest.mark.parametrize(
    "adapter", [{}, {"type": "prefix_tuning"}, {"type": "prompt_tuning"}], ids=str
)
def test_numbers_of_weights_and_of_trained_ones(adapter: dict[str, Any]) -> None:
    config, spec = config_of("roberta"), spec_of(**adapter)
    counts, model = count_step(FakeModel(config, TASK, spec), ROWS, LENGTH), real(config, spec)
    groups = trainable_by_layer(model, find_blocks(model)[0])
    of_layers = [sum(v.numel() for v in groups.get(layer, {}).values()) for layer in range(LAYERS)]
    assert [block.trainable_parameters for block in counts.blocks] == of_layers
    assert sum(of_layers) + counts.rest.trainable_parameters == count_parameters(groups)
    parts = (*counts.blocks, counts.rest)
    assert sum(part.parameters for part in parts) == sum(v.numel() for v in model.parameters())
    assert all_weights(counts) == sum(v.nbytes for v in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(("family", "precision"), [("bert", "fp32"), ("gpt2", "bf16")])
def test_under_checkpointing_inputs_are_stored_and_blocks_run_twice(
    family: str, precision: str
) -> None:
    config, spec = config_of(family), spec_of()
    fake = FakeModel(config, TASK, spec, precision=precision)
    model = real(config, spec, precision=precision)
    counts = count_step(fake, ROWS, LENGTH, checkpointing=True)
    for active in patterns():
        counter = OperationCounter(model)

        def note(call: Call, counter: OperationCounter = counter) -> None:
            for tensor in call.tensors:
                counter.store(tensor, 0)

        with stepping(model, active, precision, note), counter:
            with autocast(precision, torch.device("cpu")), counter.storing():
                loss = fake.task.loss(model, batch(fake))
            stored = counter.stored_bytes
            loss.backward()
        assert sum(counter.flops.values()) == step_flops(counts, active)
        assert stored == step_stored_bytes(counts, active)
        hidden_state = 4 * ROWS * LENGTH * 32  # gradients that are not needed with other gates
        assert abs(stored + counts.passing_bytes - counter.peak_bytes) <= 2 * hidden_state


@pytest.mark.parametrize(("family", "precision"), [("bert", "fp32"), ("llama", "bf16")])
def test_temporary_bytes_are_the_peak_minus_what_is_stored(family: str, precision: str) -> None:
    """For all gates, within 6 %, which are due to the adapters' gradients."""
    config, spec = config_of(family), spec_of()
    fake = FakeModel(config, TASK, spec, precision=precision)
    model = real(config, spec, precision=precision)
    counts = count_step(fake, ROWS, 33)
    for active in patterns():
        counter = OperationCounter(model)
        with stepping(model, active, precision), counter:
            with autocast(precision, torch.device("cpu")):
                loss = fake.task.loss(model, batch(fake, ROWS, 33))
            loss.backward()
        expected = step_stored_bytes(counts, active) + counts.passing_bytes
        assert counter.peak_bytes == pytest.approx(expected, rel=0.06), active


def test_frozen_layers_do_not_change_the_others() -> None:
    """So one count with adapters in all layers is enough for any number of frozen layers."""
    config = config_of("llama")
    everywhere = count_step(FakeModel(config, TASK, spec_of()), ROWS, LENGTH)
    behind = count_step(FakeModel(config, TASK, spec_of(frozen=2)), ROWS, LENGTH)
    assert behind.blocks[2:] == everywhere.blocks[2:]
    assert behind.rest == everywhere.rest
    assert [block.stored_bytes for block in behind.blocks[:2]] == [0, 0]
    assert [block.backward_flops for block in behind.blocks[:2]] == [0, 0]


def test_costs_are_linear_in_the_batch_size() -> None:
    """From two rows on. Temporary bytes are only nearly linear, so they are always counted."""
    fake = FakeModel(config_of("bert"), TASK, spec_of(), precision="bf16")
    two, three, nine = (count_step(fake, rows, LENGTH) for rows in (2, 3, 9))
    for active in patterns():
        for cost in (step_flops, step_stored_bytes):
            slope = cost(three, active) - cost(two, active)
            assert cost(nine, active) == cost(two, active) + 7 * slope


def test_a_single_row_counts_as_padded() -> None:
    config, spec = config_of("llama"), spec_of()
    fake, model = FakeModel(config, TASK, spec), real(config, spec)
    counts, meter = count_step(fake, 1, LENGTH), ActivationMeter(model)
    row = batch(fake, rows=1)
    row["attention_mask"][0, -1] = 0
    with stepping(model, (True,) * LAYERS), meter.measuring():
        fake.task.loss(model, row)
    assert meter.peak_bytes == step_stored_bytes(counts, (True,) * LAYERS)


def test_one_block_is_run_for_all_like_it() -> None:
    """Of forty equal layers only the first and the last are run."""
    fake = FakeModel(config_of("bert", 40), TASK, spec_of(40))
    ran: set[int] = set()
    for index, block in enumerate(fake.blocks):
        inside: Any = block
        inside.intermediate.register_forward_hook(lambda *_, index=index: ran.add(index))
    counts = count_step(fake, ROWS, LENGTH)
    assert ran == {0, 39}
    shallow = count_step(FakeModel(config_of("bert"), TASK, spec_of()), ROWS, LENGTH)
    assert counts.blocks == shallow.blocks[:1] * 40
    assert counts.rest == shallow.rest


def test_a_model_whose_forward_depends_on_values_is_refused() -> None:
    config = AutoConfig.for_model(
        "xmod",
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        languages=["en_XX"],
        default_language="en_XX",
    )
    fake = FakeModel(config, TASK, spec_of(2, targets=["query"]))
    with pytest.raises(DroppeftError, match="costs of a xmod model cannot be counted without"):
        count_step(fake, ROWS, LENGTH)


def test_counting_changes_neither_configuration_nor_generator() -> None:
    config = config_of("bert")
    before, state = config.to_dict(), torch.get_rng_state()
    count_step(FakeModel(config, TASK, spec_of()), ROWS, LENGTH)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
