"""The estimates of the study of gradients on made-up gradients, and its layers in a tiny model."""

import copy
from typing import Any

import pytest
import torch

from benchmarks.gradient_fidelity.candidates import FULL, candidates
from benchmarks.gradient_fidelity.estimates import compared, summary
from benchmarks.gradient_fidelity.layers import Mode, relative_cost, with_modes
from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.layer_dropout import find_blocks
from tiny import tiny_model

BATCHES, VALUES = 5, 40
MERITS = ("batch", "best", "plain", "signs")


@pytest.fixture
def full() -> torch.Tensor:
    """Gradients of five batches at full depth: a common part, and noise."""
    torch.manual_seed(0)
    return torch.randn(VALUES) + 0.3 * torch.randn(BATCHES, VALUES)


def summarised(full: torch.Tensor, *choices: torch.Tensor, cost: float = 1.0) -> dict[str, Any]:
    """The summary of a candidate whose steps have one of these gradients (BATCHES, VALUES)."""

    def rows(gradients: torch.Tensor, cost: float) -> list[dict[str, Any]]:
        return [
            {"batch": batch, "cost": cost, **compared(gradients[batch], batch, full)}
            for batch in range(BATCHES)
        ]

    drawn = [row for choice in choices for row in rows(choice, cost)]
    means = torch.stack(choices).mean(0)
    return summary(drawn, rows(full, 1.0), means, full, all_choices=True)


def test_full_depth_is_as_good_as_itself(full: torch.Tensor) -> None:
    found = summarised(full, full)
    expected = dict.fromkeys((*MERITS, "cost", "cosine", "second_moment"), 1.0)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["expectation_cosine"] == pytest.approx(1)
    for name in ("draws_moment", *(f"{merit}_error" for merit in MERITS)):
        assert found[name] == pytest.approx(0, abs=1e-6)


def test_no_gradient_is_worth_nothing(full: torch.Tensor) -> None:
    found = summarised(full, torch.zeros_like(full), cost=0.5)
    assert found["cost"] == 0.5
    assert found["expectation_cosine"] is None
    assert {found[name] for name in ("cosine", "second_moment", *MERITS)} == {0.0}


def test_the_best_rate_makes_up_for_the_length_of_a_gradient(full: torch.Tensor) -> None:
    found = summarised(full, 2 * full, cost=0.5)
    assert (found["cosine"], found["second_moment"]) == pytest.approx((1, 4))
    assert [found[merit] for merit in MERITS] == pytest.approx([2, 2, 4, 2])


def test_draws_without_bias_add_variance_alone(full: torch.Tensor) -> None:
    """Half of the steps have twice the gradient, and the others have none."""
    found = summarised(full, 2 * full, torch.zeros_like(full))
    assert found["expectation_cosine"] == pytest.approx(1)
    assert (found["second_moment"], found["draws_moment"]) == pytest.approx((2, 1))
    assert [found[merit] for merit in MERITS] == pytest.approx([0.5, 0.5, 1, 0.5])


def test_the_cost_is_that_of_the_layers_that_run() -> None:
    block, rest = BlockCounts(10, 10, 0, 0, 0, 0), BlockCounts(4, 2, 0, 0, 0, 0)
    counts = StepCounts(1, 1, (block,) * 6, rest, 0)
    first, *others = candidates([1.0, 0.5, 0.4, 0.1, 0.2, 0.6])
    assert first.name == FULL
    assert relative_cost(counts, *first.choices) == 1
    upper_half = (Mode.FORWARD,) * 3 + (Mode.TRAIN,) * 3
    [upper] = [one for one in others if one.name == "upper half"]
    assert upper.choices == (upper_half,)
    assert relative_cost(counts, upper_half) == (60 + 30 + 6) / 126


def test_modes_of_layers_are_what_they_are_called() -> None:
    model = tiny_model().eval()
    sliced = copy.deepcopy(model)
    del sliced.bert.encoder.layer[1]
    batch = {"input_ids": torch.arange(4, 16).view(2, 6), "labels": torch.tensor([0, 1])}

    def loss_and_gradient(model: Any) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return float(loss.detach()), model.bert.embeddings.word_embeddings.weight.grad

    plain, without, found = loss_and_gradient(model), loss_and_gradient(sliced), {}
    with with_modes(find_blocks(model)[1]) as layers:
        layers.means = [torch.zeros(32)] * 4
        for mode in Mode:
            layers.modes = (Mode.TRAIN, mode, Mode.TRAIN, Mode.TRAIN)
            found[mode] = loss_and_gradient(model)
    assert found[Mode.TRAIN][0] == found[Mode.DETACHED][0] == plain[0]
    assert torch.equal(found[Mode.TRAIN][1], plain[1])
    assert not torch.allclose(found[Mode.DETACHED][1], plain[1], rtol=1e-3)
    for mode in (Mode.SKIP, Mode.MEAN):
        assert found[mode][0] == without[0] != plain[0]
        assert torch.equal(found[mode][1], without[1])
