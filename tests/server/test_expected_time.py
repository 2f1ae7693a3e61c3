"""The time that a run says before its first round."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from droppeft.config import load_config
from droppeft.server.expected_time import estimate_wall_s
from droppeft.training.loop import Evaluation

CLIENTS = [SimpleNamespace(train=np.arange(80), validation=np.arange(8), test=np.arange(10))] * 20


def evaluation(rows: int, tokens: int, wall_s: float) -> Evaluation:
    return Evaluation({"loss": 1.0, "accuracy": 0.5}, rows, wall_s, tokens)


MEASURED = evaluation(rows=100, tokens=3000, wall_s=6.0)
"""A row takes 60 ms."""


def expected(*overrides: str, has_global_model: bool = True, workers: int = 1) -> float | None:
    config = load_config(None, ["rounds=10", "frozen.layers=3", *overrides])
    prepared: Any = SimpleNamespace(
        config=config,
        setup=SimpleNamespace(num_layers=6),
        loaded=SimpleNamespace(clients=CLIENTS, workers=workers),
        test=range(1000),
        method=SimpleNamespace(has_global_model=lambda config: has_global_model),
    )
    return estimate_wall_s(prepared, MEASURED)


TRAINING = 10 * 5 * 10 * 16 * 2
"""Rows times forward passes: half of the layers are trained, with a backward pass of two each."""


VALIDATION = 3 * 8
"""Rows on which three clients measure the global model."""


@pytest.mark.parametrize(
    ("overrides", "forward_rows"),
    [
        ([], TRAINING + 10 * (100 + VALIDATION) + 1000 + 200),
        (["evaluation.every=3"], TRAINING + 4 * (100 + VALIDATION) + 1000 + 200),
        (["evaluation.personalised=false"], TRAINING + 10 * (100 + VALIDATION) + 1000),
        (
            ["evaluation.validation_clients=0"],
            TRAINING + 10 * 100 + 1000 + 200,
        ),
        (["frozen.layers=0"], TRAINING * 1.5 + 10 * (100 + VALIDATION) + 1000 + 200),
        (["training.local_epochs=1"], TRAINING / 2 + 10 * (100 + VALIDATION) + 1000 + 200),
    ],
)
def test_the_time_follows_from_the_rows(overrides: list[str], forward_rows: float) -> None:
    assert expected(*overrides) == pytest.approx(forward_rows * 0.06)


def test_without_a_global_model_only_clients_are_evaluated() -> None:
    assert expected(has_global_model=False) == pytest.approx((TRAINING + 200) * 0.06)


def test_five_clients_take_three_turns_of_two_workers() -> None:
    # A row of the evaluation takes 60 ms because two workers share them.
    evaluated = 10 * (100 + VALIDATION) + 1000 + 200
    assert expected(workers=2) == pytest.approx((TRAINING * 2 * 3 / 5 + evaluated) * 0.06)


def test_clients_elsewhere_take_an_unknown_time() -> None:
    assert expected("transport=flower") is None
