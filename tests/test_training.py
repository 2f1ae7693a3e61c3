import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import nn

from droppeft import training
from droppeft.adapters.attach import attach
from droppeft.adapters.by_layer import Parameters, get_tensors, trainable_by_layer
from droppeft.config import TrainingConfig
from droppeft.data.tasks import Batch, Classification
from droppeft.data.tokens import TokenTable
from droppeft.layer_dropout import find_blocks, gated
from droppeft.plans import HEAD, AdapterSpec, Budget, LayerAdapter, Tensors
from droppeft.training import (
    SCHEDULES,
    ActivationMeter,
    TrainOutcome,
    evaluate,
    rate_factor,
    train,
    turn_batches,
)
from tiny import tiny_model

CPU = torch.device("cpu")
LAYERS = 4
STEPS = 4
ALL = (True,) * LAYERS
TASK = Classification(("input_ids",), 0, CPU)
FACTORS = (0.5, 1.0, 0.75, 0.25)
Gates = Sequence[Sequence[bool]]


def token_table(rows: int, classes: int = 2, longest: int = 9) -> TokenTable:
    values = np.random.default_rng(0)
    lengths = values.integers(2, longest + 1, rows)
    ids = values.integers(1, 64, lengths.sum()).astype(np.int32)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return TokenTable({"input_ids": ids}, offsets, values.integers(0, classes, rows))


TABLE = token_table(40)
BATCHES = [TASK.collate(TABLE, np.arange(start, start + 5)) for start in range(0, 5 * STEPS, 5)]


@dataclass
class Bench:
    model: nn.Module
    blocks: tuple[nn.Module, ...]
    parameters: Parameters

    @property
    def trained(self) -> list[nn.Parameter]:
        return [value for named in self.parameters.values() for value in named.values()]


def bench(module_dropout: float = 0.0, adapter_dropout: float = 0.0) -> Bench:
    """A model with an adapter that does something: a fresh LoRA gives A no gradient."""
    backbone = tiny_model(LAYERS)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = module_dropout
    spec = AdapterSpec((LayerAdapter("lora", 2),) * LAYERS, 16.0, adapter_dropout)
    model = attach(backbone, spec, find_blocks(backbone)[0], 0)
    path, blocks = find_blocks(model)
    parameters = trainable_by_layer(model, path)
    torch.manual_seed(1)
    with torch.no_grad():
        for named in parameters.values():
            for value in named.values():
                value.normal_(std=0.2)
    return Bench(model, blocks, parameters)


def settings(**changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"learning_rate": 0.01, "head_learning_rate": 0.03, "weight_decay": 0.1, **changes}
    )


def run(
    on: Bench,
    config: TrainingConfig,
    gates: Gates = (ALL,) * STEPS,
    factors: Sequence[float] = FACTORS,
    proximal: float = 0.0,
) -> TrainOutcome:
    """Train one step per entry of ``gates``."""
    torch.manual_seed(2)
    return train(
        on.model,
        on.blocks,
        on.parameters,
        BATCHES[: len(gates)],
        gates.__getitem__,
        factors,
        TASK,
        config,
        proximal,
    )


def plain_loop(
    on: Bench,
    config: TrainingConfig,
    gates: Gates = (ALL,) * STEPS,
    proximal: float = 0.0,
) -> tuple[list[float], list[list[float]]]:
    """What `train` means, in the words of a PyTorch tutorial: losses, and norms by step."""
    torch.manual_seed(2)
    head = list(on.parameters[HEAD].values())
    rest = on.trained[: -len(head)]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "lr": 0.0}, {"params": head, "lr": 0.0}],
        weight_decay=config.weight_decay,
    )
    starts = [value.detach().clone() for value in on.trained]
    losses, norms = [], []
    on.model.train()
    for step, active in enumerate(gates):
        batch = dict(BATCHES[step])
        labels = batch.pop("labels")
        with gated(on.blocks) as gate:
            gate.active = tuple(active)
            loss = nn.functional.cross_entropy(on.model(**batch).logits, labels)
        losses.append(loss.item())
        loss.backward()
        norms.append([_norm(on.parameters[layer].values()) for layer in range(LAYERS)])
        if proximal:
            pairs = zip(on.trained, starts, strict=True)
            far = [((w - s) ** 2).sum() for w, s in pairs if _runs(on, w, active)]
            (proximal / 2 * torch.stack(far).sum()).backward()
        nn.utils.clip_grad_norm_(on.trained, config.clip_norm)
        optimizer.param_groups[0]["lr"] = config.learning_rate * FACTORS[step]
        optimizer.param_groups[1]["lr"] = config.head_learning_rate * FACTORS[step]
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def _runs(on: Bench, value: nn.Parameter, active: Sequence[bool]) -> bool:
    off = [layer for layer, runs in enumerate(active) if not runs]
    return not any(value is other for layer in off for other in on.parameters[layer].values())


def _norm(values: Any) -> float:
    gradients = [value.grad for value in values if value.grad is not None]
    return math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(array, other[key][name])
        for key, named in one.items()
        for name, array in named.items()
    )


@pytest.mark.parametrize("dropout", [(0.0, 0.0), (0.1, 0.2)], ids=["plain", "module dropout"])
@pytest.mark.parametrize("clip_norm", [1e-8, 1.0, 1e6])
def test_at_full_depth_training_is_the_plain_loop_bit_for_bit(
    dropout: tuple[float, float], clip_norm: float
) -> None:
    ours, plain = bench(*dropout), bench(*dropout)
    outcome = run(ours, settings(clip_norm=clip_norm))
    losses, norms = plain_loop(plain, settings(clip_norm=clip_norm))
    assert same(get_tensors(ours.parameters), get_tensors(plain.parameters))
    assert not same(get_tensors(ours.parameters), get_tensors(bench().parameters))
    assert outcome.loss == pytest.approx(np.mean(losses))
    # Before clipping: the same for every clip_norm in the first step, and never near 1e-8.
    assert outcome.importance == pytest.approx(np.mean(norms, axis=0).tolist())
    assert min(outcome.importance) > 1e-6


def test_module_dropout_is_on_while_training() -> None:
    still, noisy = bench(), bench(module_dropout=0.1)
    noisy.model.eval()
    run(still, settings())
    run(noisy, settings())
    assert not same(get_tensors(still.parameters), get_tensors(noisy.parameters))


def test_the_frozen_backbone_is_left_alone() -> None:
    on = bench()
    frozen = {n: v.clone() for n, v in on.model.named_parameters() if not v.requires_grad}
    run(on, settings())
    assert all(torch.equal(on.model.get_parameter(name), value) for name, value in frozen.items())
    assert all(value.grad is None for value in on.model.parameters())


def test_the_turn_is_counted() -> None:
    outcome = run(bench(), settings())
    assert (outcome.steps, outcome.examples) == (STEPS, 5 * STEPS)
    longest = [TABLE.lengths[start : start + 5].max() for start in range(0, 5 * STEPS, 5)]
    assert outcome.tokens == 5 * sum(longest)
    assert outcome.active_steps == (STEPS,) * LAYERS
    assert outcome.wall_s > 0


def test_a_layer_that_never_runs_is_left_as_it_was() -> None:
    on = bench()
    before = get_tensors(on.parameters)
    outcome = run(on, settings(weight_decay=1.0), [(True, False, True, True)] * STEPS)
    after = get_tensors(on.parameters)
    assert {key: same({0: before[key]}, {0: after[key]}) for key in before} == {
        0: False,
        1: True,
        2: False,
        3: False,
        HEAD: False,
    }
    assert outcome.active_steps == (STEPS, 0, STEPS, STEPS)
    assert outcome.importance[1] == 0.0
    assert min(outcome.importance[layer] for layer in (0, 2, 3)) > 0


def test_a_dropped_layer_rests_in_that_step_whatever_its_momentum() -> None:
    """Equal first step; in the second layer 2 is dropped, and neither momentum nor decay act."""
    one, two = bench(), bench()
    run(one, settings(weight_decay=1.0), [ALL])
    run(two, settings(weight_decay=1.0), [ALL, (True, True, False, True)])
    first, second = get_tensors(one.parameters), get_tensors(two.parameters)
    assert same({2: first[2]}, {2: second[2]})
    assert not same({1: first[1]}, {1: second[1]})


SOME: Gates = [
    (True, True, False, True),
    (True, False, False, True),
    (True, True, True, True),
    (False, False, False, True),
]


def test_importance_is_the_mean_over_the_steps_in_which_a_layer_ran() -> None:
    ours, plain = bench(), bench()
    outcome = run(ours, settings(), SOME)
    _, norms = plain_loop(plain, settings(), SOME)
    ran = np.array(SOME).sum(axis=0)
    assert outcome.active_steps == tuple(ran) == (3, 2, 1, 4)
    assert outcome.importance == pytest.approx((np.sum(norms, axis=0) / ran).tolist())
    assert same(get_tensors(ours.parameters), get_tensors(plain.parameters))


def test_norms_lie_on_the_device_where_the_gradients_are() -> None:
    """A dropped layer has none; its zero must be there too."""
    device = torch.device("meta")
    value = nn.Parameter(torch.ones(2, device=device))
    value.grad = torch.ones(2, device=device)
    dropped = nn.Parameter(torch.ones(2, device=device))
    norms = training._gradient_norms({0: {"a": value}, 1: {"b": dropped}}, 3, device)
    assert (norms.device, norms.shape) == (device, (3,))


@pytest.mark.parametrize("gates", [(ALL,) * STEPS, SOME], ids=["full depth", "dropped"])
def test_the_proximal_term_is_the_one_that_autograd_derives(gates: Gates) -> None:
    ours, plain, without = bench(), bench(), bench()
    outcome = run(ours, settings(), gates, proximal=3.0)
    _, norms = plain_loop(plain, settings(), gates, proximal=3.0)
    run(without, settings(), gates)
    derived = get_tensors(plain.parameters)
    for key, named in get_tensors(ours.parameters).items():
        for name, array in named.items():
            np.testing.assert_allclose(array, derived[key][name], rtol=1e-3, atol=1e-5)
    ran = np.maximum(np.array(gates).sum(axis=0), 1)
    assert outcome.importance == pytest.approx((np.sum(norms, axis=0) / ran).tolist(), rel=1e-4)
    assert not same(get_tensors(ours.parameters), get_tensors(without.parameters))


def test_the_head_has_a_learning_rate_of_its_own() -> None:
    """AdamW's first step is the learning rate itself, up to eps, in every coordinate."""
    on = bench()
    before = get_tensors(on.parameters)
    config = settings(learning_rate=1e-3, head_learning_rate=1e-1, weight_decay=0.0, clip_norm=1e6)
    run(on, config, [ALL], factors=[0.5])
    for key, named in get_tensors(on.parameters).items():
        steps = np.concatenate([(named[n] - before[key][n]).ravel() for n in named])
        expected = 0.5e-1 if key == HEAD else 0.5e-3
        assert np.median(np.abs(steps)) == pytest.approx(expected, rel=1e-2)


def test_a_rate_of_zero_moves_nothing() -> None:
    on = bench()
    before = get_tensors(on.parameters)
    run(on, settings(), factors=[0.0] * STEPS)
    assert same(get_tensors(on.parameters), before)


def test_the_forward_runs_in_bf16_where_asked_and_the_adapter_stays_in_fp32() -> None:
    full, half = bench(), bench()
    first = run(full, settings())
    second = run(half, settings(precision="bf16"))
    assert first.loss != second.loss
    assert first.loss == pytest.approx(second.loss, rel=0.05)
    assert {value.dtype for value in half.trained} == {torch.float32}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def stored_by(model: nn.Module, *forwards: Callable[[], torch.Tensor]) -> int:
    meter = ActivationMeter(model)
    for forward in forwards:
        with meter.measuring():
            forward()
    return meter.peak_bytes


def test_the_meter_counts_what_backward_needs() -> None:
    """Of 5 rows: the input (4 wide), ReLU's output (8, kept by ReLU and by the second layer, one
    storage) and the squared output (3), 4 bytes each; no weight."""
    model, x = mlp(), torch.ones(5, 4)
    assert stored_by(model, lambda: model(x).square().sum()) == 5 * (4 + 8 + 3) * 4


def test_the_meter_counts_nothing_for_what_needs_no_gradient() -> None:
    model, x = mlp(), torch.ones(5, 4)
    with torch.no_grad():
        assert stored_by(model, lambda: model(x).square().sum()) == 0
    # With the first layer frozen neither its input nor ReLU's mask is needed.
    model.get_submodule("0").requires_grad_(False)
    assert stored_by(model, lambda: model(x).square().sum()) == 5 * (8 + 3) * 4


def test_the_meter_counts_a_storage_once_and_whole() -> None:
    row = torch.ones(100, requires_grad=True).clone()
    part, other = row[:10], row[5:20]
    assert stored_by(nn.Identity(), lambda: part.square().sum() + other.square().sum()) == 400


def test_the_meter_keeps_the_largest_forward() -> None:
    model = mlp()
    small, large = torch.ones(2, 4), torch.ones(6, 4)
    sizes = [lambda: model(large).square().sum(), lambda: model(small).square().sum()]
    assert stored_by(model, *sizes) == 6 * (4 + 8 + 3) * 4


def test_metering_changes_no_gradient() -> None:
    metered, plain, x = mlp(), mlp(), torch.ones(5, 4)
    with ActivationMeter(metered).measuring():
        loss = metered(x).square().sum()
    loss.backward()
    plain(x).square().sum().backward()
    pairs = zip(metered.parameters(), plain.parameters(), strict=True)
    assert all(
        one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
        for one, other in pairs
    )


def test_every_dropped_layer_saves_the_same_memory() -> None:
    def peak(*gates: Sequence[bool]) -> int:
        on = bench()
        batch = [BATCHES[0]] * len(gates)
        return train(
            on.model, on.blocks, on.parameters, batch, gates.__getitem__, [1.0] * 9, TASK,
            settings(),
        ).activation_bytes_peak  # fmt: skip

    four, three, two = (
        peak(ALL),
        peak((True, False, True, True)),
        peak((True, False, False, True)),
    )
    assert four - three == three - two > 0
    # The largest step counts.
    assert peak((True, False, False, True), ALL, (True, False, True, True)) == four


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.floats(0, 0.9),
    st.lists(st.floats(0, 1), min_size=2, max_size=20),
)
def test_rates_rise_during_warm_up_and_never_after(
    schedule: str, warm_up: float, points: list[float]
) -> None:
    config = settings(schedule=schedule, warmup_fraction=warm_up)
    rates = {point: rate_factor(config, point) for point in sorted(points)}
    assert all(0 <= rate <= 1 for rate in rates.values())
    rising = [rate for point, rate in rates.items() if point < warm_up]
    falling = [rate for point, rate in rates.items() if point >= warm_up]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)])
@pytest.mark.parametrize("warm_up", [0.0, 0.25])
def test_rates_at_the_ends(schedule: str, end: float, warm_up: float) -> None:
    config = settings(schedule=schedule, warmup_fraction=warm_up)
    assert rate_factor(config, 0.0) == (0.0 if warm_up else 1.0)
    assert rate_factor(config, warm_up / 2) == (0.5 if warm_up else 1.0)
    assert rate_factor(config, warm_up) == 1.0
    assert rate_factor(config, 1.0) == pytest.approx(end, abs=1e-12)


def test_rates_half_way() -> None:
    middle = 0.2 + 0.8 / 4  # a quarter of what follows warm-up
    for schedule, rate in (("constant", 1), ("linear", 0.75), ("cosine", (1 + 0.5**0.5) / 2)):
        config = settings(schedule=schedule, warmup_fraction=0.2)
        assert rate_factor(config, middle) == pytest.approx(rate)


BIG = token_table(300)
own_rows = st.sets(st.integers(0, 299), min_size=1, max_size=60).map(
    lambda rows: np.array(sorted(rows))
)


def seen(batches: Sequence[np.ndarray[Any, Any]]) -> Counter[int]:
    return Counter(int(row) for batch in batches for row in batch)


@given(own_rows, st.integers(1, 8), st.integers(1, 40), st.integers(0, 99))
def test_a_turn_of_steps_has_that_many_and_prefers_no_row(
    rows: np.ndarray[Any, Any], batch_size: int, steps: int, seed: int
) -> None:
    draw = (rows, BIG, batch_size, Budget(steps=steps))
    batches = turn_batches(*draw, np.random.default_rng(seed))
    assert len(batches) == steps
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    counts = seen(batches)
    assert counts.keys() <= set(rows.tolist())
    times = [counts[row] for row in rows.tolist()]
    assert max(times) - min(times) <= 1
    if steps * batch_size < len(rows):
        assert sum(times) == steps * batch_size
    again = turn_batches(*draw, np.random.default_rng(seed))
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]


@given(own_rows, st.integers(1, 8), st.integers(1, 3), st.integers(0, 99))
def test_a_turn_of_epochs_takes_every_row_once_in_each(
    rows: np.ndarray[Any, Any], batch_size: int, epochs: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    batches = turn_batches(rows, BIG, batch_size, Budget(epochs=epochs), rng)
    each = math.ceil(len(rows) / batch_size)
    assert len(batches) == epochs * each
    for epoch in range(epochs):
        part = seen(batches[epoch * each : (epoch + 1) * each])
        assert part == Counter(rows.tolist())


def test_short_turns_differ_and_reach_every_row() -> None:
    rows = np.arange(40)
    rng = np.random.default_rng(0)
    turns = [seen(turn_batches(rows, BIG, 4, Budget(steps=2), rng)) for _ in range(60)]
    assert len({tuple(sorted(turn)) for turn in turns}) > 50
    assert set().union(*turns) == set(rows.tolist())


class Reader(nn.Module):
    """Logits from the first token and the count of real ones; counts how often it is asked."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(64, classes)
        self.forwards = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.forwards += 1

        class Output:
            logits = self.embedding(input_ids[:, 0]) + attention_mask.sum(1, keepdim=True) / 9

        return Output()


def naive(model: nn.Module, table: TokenTable, rows: Any) -> tuple[list[float], list[int]]:
    losses, predicted = [], []
    for row in rows:
        batch: Batch = TASK.collate(table, np.array([row]))
        with torch.no_grad():
            loss, logits = TASK.loss_and_logits(model, batch)
        losses.append(float(loss))
        predicted.append(int(logits.argmax()))
    return losses, predicted


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_evaluation_is_the_naive_loop_over_rows(classes: int, batch_size: int) -> None:
    table, rows = token_table(50, classes), np.arange(3, 44)[::-1]
    model = Reader(classes)
    result = evaluate(model, table, rows, TASK, batch_size)
    assert model.forwards == math.ceil(len(rows) / batch_size)
    losses, predicted = naive(model, table, rows)
    labels = table.labels[rows]
    average = "binary" if classes == 2 else "macro"
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.accuracy == np.mean(np.array(predicted) == labels)
    assert result.f1 == pytest.approx(f1_score(labels, predicted, average=average))
    assert result.rows == len(rows)
    assert result.wall_s > 0


def test_a_skewed_device_can_be_evaluated() -> None:
    """Labels 0 and 1 alone do not make four classes two."""
    table = token_table(50, classes=4)
    rows = np.flatnonzero(table.labels < 2)
    result = evaluate(Reader(4), table, rows, TASK, 8)
    _, predicted = naive(Reader(4), table, rows)
    assert max(predicted) > 1
    assert result.f1 == pytest.approx(f1_score(table.labels[rows], predicted, average="macro"))


def test_evaluation_of_a_transformer_is_without_dropout_and_without_gradient() -> None:
    on = bench(module_dropout=0.5)
    on.model.train()
    rows = np.arange(20)
    result = evaluate(on.model, TABLE, rows, TASK, 6)
    assert not on.model.training
    losses, predicted = naive(on.model, TABLE, rows)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.accuracy == np.mean(np.array(predicted) == TABLE.labels[rows])
    assert all(value.grad is None for value in on.model.parameters())


def test_evaluation_in_bf16_is_near_and_not_equal() -> None:
    on, rows = bench(), np.arange(20)
    full = evaluate(on.model, TABLE, rows, TASK, 6)
    half = evaluate(on.model, TABLE, rows, TASK, 6, "bf16")
    assert full.loss != half.loss
    assert full.loss == pytest.approx(half.loss, rel=0.05)


@pytest.mark.parametrize(
    ("names", "output"),
    [
        (["classifier.weight", "classifier.bias"], {"classifier.weight", "classifier.bias"}),
        (["x.pooler.dense.weight", "classifier.weight"], {"classifier.weight"}),
        (["classifier.dense.weight", "classifier.out_proj.weight"], {"classifier.out_proj.weight"}),
    ],
)
def test_only_the_map_to_the_classes_has_the_head_s_rate(
    names: list[str], output: set[str]
) -> None:
    head = {name: nn.Parameter(torch.zeros(1)) for name in names}
    assert training._output_names({0: {"a": nn.Parameter(torch.zeros(1))}, HEAD: head}) == output
