import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import nn

from droppeft.adapters.attach import attach
from droppeft.adapters.by_layer import Parameters, get_tensors, trainable_by_layer
from droppeft.data.tokens import TokenTable
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks, gated
from droppeft.layer_dropout.modes import Mode, skipping
from droppeft.messages.instruction import (
    TASK_ALONE,
    AdapterSpec,
    Budget,
    LayerAdapter,
    LocalTraining,
    Objective,
    RankPenalty,
)
from droppeft.messages.tensors import HEAD, Tensors
from droppeft.models import precision
from droppeft.tasks.classification import Batch, Classification
from droppeft.training import learning_rates
from droppeft.training.gradients import Gradients
from droppeft.training.learning_rates import SCHEDULES, rate_factor
from droppeft.training.loop import (
    Step,
    Trainable,
    TrainOutcome,
    evaluate,
    train,
    training_batches,
)
from handmade import TRAINING
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
class SmallModel:
    model: nn.Module
    blocks: tuple[nn.Module, ...]
    parameters: Parameters

    @property
    def trainable(self) -> Trainable:
        return Trainable(self.model, self.blocks, self.parameters, TASK)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [value for named in self.parameters.values() for value in named.values()]


def small_model(module_dropout: float = 0.0, adapter_dropout: float = 0.0) -> SmallModel:
    """A tiny model with LoRA at random values, since with initial ones A would have no gradient."""
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
    return SmallModel(model, blocks, parameters)


def settings(**changes: Any) -> LocalTraining:
    rates = {"learning_rate": 0.01, "head_learning_rate": 0.03, "weight_decay": 0.1}
    return replace(TRAINING, **{**rates, **changes})


def run(
    on: SmallModel,
    config: LocalTraining,
    gates: Gates = (ALL,) * STEPS,
    factors: Sequence[float] = FACTORS,
    objective: Objective = TASK_ALONE,
) -> TrainOutcome:
    """Train one step per entry of ``gates``."""
    torch.manual_seed(2)
    steps = [
        Step([batch], skipping(active), factor)
        for batch, active, factor in zip(BATCHES, gates, factors, strict=False)
    ]
    return train(on.trainable, steps, config, objective)


def plain_loop(
    on: SmallModel,
    config: LocalTraining,
    gates: Gates = (ALL,) * STEPS,
    term: Callable[[SmallModel, Sequence[torch.Tensor], Sequence[bool]], torch.Tensor]
    | None = None,
) -> tuple[list[float], list[list[float]]]:
    """Train as in a PyTorch tutorial; return the losses, and gradient norms by step and layer."""
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
        if term is not None:
            term(on, starts, active).backward()
        nn.utils.clip_grad_norm_(on.trained, config.clip_norm)
        optimizer.param_groups[0]["lr"] = config.learning_rate * FACTORS[step]
        optimizer.param_groups[1]["lr"] = config.head_learning_rate * FACTORS[step]
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def _runs(on: SmallModel, value: nn.Parameter, active: Sequence[bool]) -> bool:
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
    """Of a model in training mode as a whole, which is that of ``backbone_dropout``."""
    ours, plain = small_model(*dropout), small_model(*dropout)
    chosen = settings(clip_norm=clip_norm, backbone_dropout=any(dropout))
    outcome = run(ours, chosen)
    losses, norms = plain_loop(plain, chosen)
    assert same(get_tensors(ours.parameters), get_tensors(plain.parameters))
    assert not same(get_tensors(ours.parameters), get_tensors(small_model().parameters))
    assert outcome.loss == pytest.approx(np.mean(losses))
    # Before clipping: the same for every clip_norm in the first step, and never near 1e-8.
    assert outcome.importance == pytest.approx(np.mean(norms, axis=0).tolist())
    assert min(outcome.importance) > 1e-6


def test_module_dropout_is_on_while_training() -> None:
    still, noisy = small_model(), small_model(module_dropout=0.1)
    noisy.model.eval()
    run(still, settings())
    run(noisy, settings())
    assert not same(get_tensors(still.parameters), get_tensors(noisy.parameters))


def test_the_frozen_backbone_is_not_changed() -> None:
    on = small_model()
    frozen = {n: v.clone() for n, v in on.model.named_parameters() if not v.requires_grad}
    run(on, settings())
    assert all(torch.equal(on.model.get_parameter(name), value) for name, value in frozen.items())
    assert all(value.grad is None for value in on.model.parameters())


def test_steps_rows_and_tokens_are_counted() -> None:
    outcome = run(small_model(), settings())
    assert (outcome.steps, outcome.examples) == (STEPS, 5 * STEPS)
    longest = [TABLE.lengths[start : start + 5].max() for start in range(0, 5 * STEPS, 5)]
    assert outcome.tokens == 5 * sum(longest)
    assert outcome.active_steps == (STEPS,) * LAYERS
    assert outcome.wall_s > 0


def test_a_layer_that_never_runs_is_not_changed() -> None:
    on = small_model()
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


def test_a_dropped_layer_is_not_changed_in_that_step_whatever_its_momentum() -> None:
    """After an equal first step, layer 2 is dropped: it has neither momentum nor weight decay."""
    one, two = small_model(), small_model()
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


def test_a_layer_that_runs_forward_only_is_not_changed_whatever_its_momentum() -> None:
    """The layers above it get the gradients of a model in which all layers are trained."""
    on, full = small_model(), small_model()
    first = Step([BATCHES[0]], skipping(ALL), 1.0)
    lower = (Mode.FORWARD, Mode.FORWARD, Mode.TRAIN, Mode.TRAIN)
    outcome = train(on.trainable, [first, Step([BATCHES[1]], lower, 1.0)], settings(clip_norm=1e6))
    train(full.trainable, [first, Step([BATCHES[1]], skipping(ALL), 1.0)], settings(clip_norm=1e6))
    alone = small_model()
    train(alone.trainable, [first], settings(clip_norm=1e6))
    found, whole = get_tensors(on.parameters), get_tensors(full.parameters)
    before = get_tensors(alone.parameters)
    for layer, expected in enumerate((before, before, whole, whole)):
        assert same({layer: found[layer]}, {layer: expected[layer]})
    tokens = [batch["input_ids"].numel() for batch in BATCHES[:2]]
    assert outcome.layer_tokens == (tokens[0], tokens[0], sum(tokens), sum(tokens))
    assert outcome.forward_tokens == (tokens[1], tokens[1], 0, 0)
    assert outcome.active_steps == (1, 1, 2, 2)


def test_a_batch_in_parts_has_the_gradient_of_the_whole_batch() -> None:
    """Parts of different sizes; the loss is the mean over all rows."""
    whole, parts = small_model(), small_model()
    batch = BATCHES[0]
    split = [
        {name: column[rows] for name, column in batch.items()}
        for rows in (slice(3), slice(3, None))
    ]
    config = settings(clip_norm=1e6)
    one = train(whole.trainable, [Step([batch], skipping(ALL), 1.0)], config)
    two = train(parts.trainable, [Step(split, skipping(ALL), 1.0)], config)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert two.importance == pytest.approx(one.importance, rel=1e-4)
    assert (two.rows, two.tokens, two.targets) == (one.rows, one.tokens, one.targets)
    assert two.activation_bytes_peak < one.activation_bytes_peak
    for mine, theirs in zip(parts.trained, whole.trained, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_importance_is_the_mean_over_the_steps_in_which_a_layer_ran() -> None:
    ours, plain = small_model(), small_model()
    outcome = run(ours, settings(), SOME)
    _, norms = plain_loop(plain, settings(), SOME)
    ran = np.array(SOME).sum(axis=0)
    assert outcome.active_steps == tuple(ran) == (3, 2, 1, 4)
    assert outcome.importance == pytest.approx((np.sum(norms, axis=0) / ran).tolist())
    assert same(get_tensors(ours.parameters), get_tensors(plain.parameters))


def test_norms_lie_on_the_device_where_the_gradients_are() -> None:
    """A dropped layer has no gradient; its norm of 0 must be on the same device."""
    device = torch.device("meta")
    value = nn.Parameter(torch.ones(2, device=device))
    value.grad = torch.ones(2, device=device)
    dropped = nn.Parameter(torch.ones(2, device=device))
    parameters = {0: {"a": value}, 1: {"b": dropped}}
    norms = Gradients(parameters, 3, device).norms()
    assert (norms.device, norms.shape) == (device, (3,))


def proximal_term(
    on: SmallModel, starts: Sequence[torch.Tensor], active: Sequence[bool]
) -> torch.Tensor:
    pairs = zip(on.trained, starts, strict=True)
    far = [((w - s) ** 2).sum() for w, s in pairs if _runs(on, w, active)]
    return 3.0 / 2 * torch.stack(far).sum()


def tail_term(
    on: SmallModel, starts: Sequence[torch.Tensor], active: Sequence[bool]
) -> torch.Tensor:
    """The penalty on all ranks but the first; if B is 0, the norm has no gradient and ours is 0."""
    terms = []
    for layer in range(LAYERS):
        named = on.parameters[layer]
        for name, a in named.items():
            b = named[name.replace("lora_A", "lora_B")]
            if ".lora_A." in name and active[layer] and bool(b[:, 1:].any()):
                terms.append(a[1:].norm() * b[:, 1:].norm())
    return 2.0 * torch.stack([*terms, torch.zeros((), requires_grad=True)]).sum()


@pytest.mark.parametrize("gates", [(ALL,) * STEPS, SOME], ids=["full depth", "dropped"])
@pytest.mark.parametrize(
    ("objective", "term"),
    [
        (Objective(proximal=3.0), proximal_term),
        (Objective(rank_penalty=RankPenalty(weight=2.0, unpenalised=1)), tail_term),
    ],
    ids=["proximal", "rank penalty"],
)
def test_an_added_term_has_the_gradient_that_autograd_computes(
    gates: Gates, objective: Objective, term: Any
) -> None:
    ours, plain, without = small_model(), small_model(), small_model()
    outcome = run(ours, settings(), gates, objective=objective)
    _, norms = plain_loop(plain, settings(), gates, term)
    run(without, settings(), gates)
    derived = get_tensors(plain.parameters)
    for key, named in get_tensors(ours.parameters).items():
        for name, array in named.items():
            np.testing.assert_allclose(array, derived[key][name], rtol=1e-3, atol=1e-5)
    ran = np.maximum(np.array(gates).sum(axis=0), 1)
    assert outcome.importance == pytest.approx((np.sum(norms, axis=0) / ran).tolist(), rel=1e-4)
    assert not same(get_tensors(ours.parameters), get_tensors(without.parameters))


def test_the_head_and_b_have_separate_learning_rates() -> None:
    """AdamW's first step has the size of the learning rate, up to eps, in every coordinate."""
    on = small_model()
    before = get_tensors(on.parameters)
    rates = {"learning_rate": 1e-3, "head_learning_rate": 1e-1, "loraplus_lr_ratio": 4.0}
    run(on, settings(**rates, weight_decay=0.0, clip_norm=1e6), [ALL], factors=[0.5])
    for key, named in get_tensors(on.parameters).items():
        for name, value in named.items():
            expected = 0.5e-1 if key == HEAD else 2e-3 if ".lora_B." in name else 0.5e-3
            steps = np.abs(value - before[key][name])
            assert np.median(steps) == pytest.approx(expected, rel=1e-2), name


def test_a_learning_rate_of_zero_changes_nothing() -> None:
    on = small_model()
    before = get_tensors(on.parameters)
    run(on, settings(), factors=[0.0] * STEPS)
    assert same(get_tensors(on.parameters), before)


def test_with_bf16_the_forward_runs_in_bf16_and_the_adapter_stays_in_fp32() -> None:
    full, half = small_model(), small_model()
    first = run(full, settings())
    second = run(half, settings(precision="bf16"))
    assert first.loss != second.loss
    assert first.loss == pytest.approx(second.loss, rel=0.05)
    assert {value.dtype for value in half.trained} == {torch.float32}


# In fp16


def fp16_by_hand(on: SmallModel, gates: Gates, scale: float, first: int = 0) -> list[list[float]]:
    """Train ``on`` in fp16 as a tutorial would, without a GradScaler; return norms by step."""
    config = settings()
    head = list(on.parameters[HEAD].values())
    optimizer = torch.optim.AdamW(
        [{"params": on.trained[: -len(head)]}, {"params": head}], weight_decay=config.weight_decay
    )
    norms = []
    on.model.train()
    for step in range(first, len(gates)):
        batch = dict(BATCHES[step])
        labels = batch.pop("labels")
        with gated(on.blocks) as gate, torch.autocast("cpu", torch.float16):
            gate.active = tuple(gates[step])
            logits = on.model(**batch).logits
        (nn.functional.cross_entropy(logits.float(), labels) * scale).backward()
        for value in on.trained:
            if value.grad is not None:
                value.grad /= scale
        norms.append([_norm(on.parameters[layer].values()) for layer in range(LAYERS)])
        nn.utils.clip_grad_norm_(on.trained, config.clip_norm)
        optimizer.param_groups[0]["lr"] = config.learning_rate * FACTORS[step]
        optimizer.param_groups[1]["lr"] = config.head_learning_rate * FACTORS[step]
        optimizer.step()
        optimizer.zero_grad()
    return norms


def test_fp16_is_the_plain_loop_with_a_scaled_loss() -> None:
    ours, plain = small_model(), small_model()
    outcome = run(ours, settings(precision="fp16"), SOME)
    norms = fp16_by_hand(plain, SOME, precision.INITIAL_SCALE)
    assert same(get_tensors(ours.parameters), get_tensors(plain.parameters))
    assert outcome.active_steps == (3, 2, 1, 4)
    assert outcome.importance == pytest.approx((np.sum(norms, 0) / (3, 2, 1, 4)).tolist())
    assert {value.dtype for value in ours.trained} == {torch.float32}


def test_fp16_keeps_gradients_that_would_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small head, gradients are about 1e-6, close to the smallest number of fp16, 6e-8."""

    def importance(**changes: Any) -> tuple[float, ...]:
        on = small_model()
        with torch.no_grad():
            for value in on.parameters[HEAD].values():
                value.mul_(1e-5)
        return run(on, settings(**changes), [ALL]).importance

    exact = importance()
    assert importance(precision="fp16") == pytest.approx(exact, rel=0.05)
    monkeypatch.setattr(precision, "INITIAL_SCALE", 1.0)
    assert importance(precision="fp16") != pytest.approx(exact, rel=0.2)


@pytest.fixture
def first_step_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss scale of 2^30 gradients exceed fp16; after the backoff to 2^10 they do not."""
    monkeypatch.setattr(precision, "INITIAL_SCALE", 2.0**30)
    monkeypatch.setattr(precision, "BACKOFF", 2.0**-20)


@pytest.mark.usefixtures("first_step_overflows")
def test_a_skipped_step_uses_up_its_batch_its_gates_and_its_place_in_the_schedule() -> None:
    ours, plain = small_model(), small_model()
    outcome = run(ours, settings(precision="fp16"), SOME)
    norms = fp16_by_hand(plain, SOME, 2.0**10, first=1)
    assert same(get_tensors(ours.parameters), get_tensors(plain.parameters))
    # Of SOME without its first row, in which layers 0, 1 and 3 ran.
    assert outcome.active_steps == (2, 1, 1, 3)
    assert outcome.importance == pytest.approx((np.sum(norms, 0) / (2, 1, 1, 3)).tolist())
    assert (outcome.steps, outcome.rows, outcome.examples) == (STEPS, 5 * STEPS, 5 * (STEPS - 1))
    assert outcome.tokens == sum(batch["input_ids"].numel() for batch in BATCHES)
    assert outcome.layer_tokens[0] == sum(batch["input_ids"].numel() for batch in BATCHES[:3])


@pytest.mark.usefixtures("first_step_overflows")
def test_the_loss_is_that_of_the_steps_that_were_taken() -> None:
    both, first = small_model(), small_model()
    outcome = run(both, settings(precision="fp16"), [ALL, ALL], factors=[0.0, 0.0])
    batch = dict(BATCHES[1])
    labels = batch.pop("labels")
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        logits = first.model.train()(**batch).logits
    expected = nn.functional.cross_entropy(logits.float(), labels).item()
    assert outcome.loss == pytest.approx(expected)


@pytest.mark.parametrize("proximal", [0.0, 3.0])
def test_a_skipped_step_changes_nothing(monkeypatch: pytest.MonkeyPatch, proximal: float) -> None:
    """Neither parameters nor momentum, which the optimizer does not have yet."""
    monkeypatch.setattr(precision, "INITIAL_SCALE", 2.0**100)
    on = small_model()
    before = get_tensors(on.parameters)
    outcome = run(
        on, settings(precision="fp16", weight_decay=1.0), SOME, objective=Objective(proximal)
    )
    assert same(get_tensors(on.parameters), before)
    assert all(value.grad is None for value in on.trained)
    assert math.isnan(outcome.loss)
    assert (outcome.steps, outcome.examples) == (STEPS, 0)
    assert outcome.active_steps == (0,) * LAYERS
    assert outcome.importance == (0.0,) * LAYERS
    assert outcome.activation_bytes_peak > 0


@pytest.mark.usefixtures("first_step_overflows")
def test_every_local_training_begins_with_the_same_loss_scale() -> None:
    """Thus a resumed run has the same results as an uninterrupted one."""
    on = small_model()
    trainings = [run(on, settings(precision="fp16"), [ALL, ALL]) for _ in range(2)]
    assert [outcome.examples for outcome in trainings] == [5, 5]


def test_the_initial_loss_scale_leaves_room_for_large_gradients() -> None:
    """A single row, with a certain prediction of the wrong class, has the largest gradient."""
    on = small_model()
    with torch.no_grad():
        for name, value in on.parameters[HEAD].items():
            if name.endswith("bias"):
                value.copy_(torch.tensor([50.0, -50.0]))
    batch = {name: column[:1] for name, column in BATCHES[0].items()}
    batch["labels"] = torch.tensor([1])
    outcome = train(on.trainable, [Step([batch], skipping(ALL), 1.0)], settings(precision="fp16"))
    assert outcome.loss > 90
    assert outcome.examples == 1


def test_every_dropped_layer_saves_the_same_memory() -> None:
    def peak(*gates: Sequence[bool]) -> int:
        on = small_model()
        steps = [Step([BATCHES[0]], skipping(active), 1.0) for active in gates]
        return train(on.trainable, steps, settings()).activation_bytes_peak

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
client_rows = st.sets(st.integers(0, 299), min_size=1, max_size=60).map(
    lambda rows: np.array(sorted(rows))
)


def seen(batches: Sequence[np.ndarray[Any, Any]]) -> Counter[int]:
    return Counter(int(row) for batch in batches for row in batch)


@given(client_rows, st.integers(1, 8), st.integers(1, 40), st.integers(0, 99))
def test_a_budget_of_steps_gives_that_many_batches_and_prefers_no_row(
    rows: np.ndarray[Any, Any], batch_size: int, steps: int, seed: int
) -> None:
    draw = (rows, BIG, batch_size, Budget(steps=steps))
    batches = training_batches(*draw, np.random.default_rng(seed))
    assert len(batches) == steps
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    counts = seen(batches)
    assert counts.keys() <= set(rows.tolist())
    times = [counts[row] for row in rows.tolist()]
    assert max(times) - min(times) <= 1
    if steps * batch_size < len(rows):
        assert sum(times) == steps * batch_size
    again = training_batches(*draw, np.random.default_rng(seed))
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]


@given(client_rows, st.integers(1, 8), st.integers(1, 3), st.integers(0, 99))
def test_a_budget_of_epochs_uses_every_row_once_per_epoch(
    rows: np.ndarray[Any, Any], batch_size: int, epochs: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    batches = training_batches(rows, BIG, batch_size, Budget(epochs=epochs), rng)
    each = math.ceil(len(rows) / batch_size)
    assert len(batches) == epochs * each
    for epoch in range(epochs):
        part = seen(batches[epoch * each : (epoch + 1) * each])
        assert part == Counter(rows.tolist())


def test_short_local_trainings_differ_and_together_use_every_row() -> None:
    rows = np.arange(40)
    rng = np.random.default_rng(0)
    trainings = [seen(training_batches(rows, BIG, 4, Budget(steps=2), rng)) for _ in range(60)]
    assert len({tuple(sorted(rows_seen)) for rows_seen in trainings}) > 50
    assert set().union(*trainings) == set(rows.tolist())


class Reader(nn.Module):
    """Logits from the first token and the count of real ones; counts its forward passes."""

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
            loss, logits = TASK.loss(model, batch), TASK.logits(model, batch)
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
    assert result.metrics["accuracy"] == np.mean(np.array(predicted) == labels)
    assert result.metrics["f1"] == pytest.approx(f1_score(labels, predicted, average=average))
    assert result.rows == len(rows)
    assert result.wall_s > 0


def test_a_skewed_client_can_be_evaluated() -> None:
    """With labels 0 and 1 alone, a task of four classes still has four classes."""
    table = token_table(50, classes=4)
    rows = np.flatnonzero(table.labels < 2)
    result = evaluate(Reader(4), table, rows, TASK, 8)
    _, predicted = naive(Reader(4), table, rows)
    assert max(predicted) > 1
    assert result.metrics["f1"] == pytest.approx(
        f1_score(table.labels[rows], predicted, average="macro")
    )


def test_evaluation_of_a_transformer_is_without_dropout_and_without_gradient() -> None:
    on = small_model(module_dropout=0.5)
    on.model.train()
    rows = np.arange(20)
    result = evaluate(on.model, TABLE, rows, TASK, 6)
    assert not on.model.training
    losses, predicted = naive(on.model, TABLE, rows)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.metrics["accuracy"] == np.mean(np.array(predicted) == TABLE.labels[rows])
    assert all(value.grad is None for value in on.model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_evaluation_in_half_precision_is_close_but_not_equal(precision: str) -> None:
    on, rows = small_model(), np.arange(20)
    full = evaluate(on.model, TABLE, rows, TASK, 6)
    half = evaluate(on.model, TABLE, rows, TASK, 6, precision)
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
def test_only_the_last_linear_layer_has_the_head_s_rate(names: list[str], output: set[str]) -> None:
    head = {name: nn.Parameter(torch.zeros(1)) for name in names}
    assert (
        learning_rates._output_names({0: {"a": nn.Parameter(torch.zeros(1))}, HEAD: head}) == output
    )


def test_batches_without_rows_are_refused() -> None:
    with pytest.raises(DroppeftError, match="a batch of 0 rows is not possible"):
        training_batches(np.arange(4), TABLE, 0, Budget(steps=1), np.random.default_rng(0))
