"""A run that is ready for round 1."""

from collections.abc import Callable

import pytest

from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config, resolve
from droppeft.messages import Plan
from droppeft.server.prepare import Prepared, prepare
from runs import Clients


@pytest.fixture
def prepare_with(tiny_words: list[str]) -> Callable[..., Prepared]:
    """Make the tiny run with further settings: ``prepare_with("adapter.rank=2")``."""

    def make(*words: str) -> Prepared:
        config = resolve(load_config(None, [*tiny_words, *words]), cuda=False)
        return prepare(config, lambda step: None, "00c0ffee")

    return make


@pytest.fixture
def prepared(prepare_with: Callable[..., Prepared]) -> Prepared:
    return prepare_with()


@pytest.fixture
def clients(prepared: Prepared) -> Clients:
    return clients_of(prepared.loaded)


@pytest.fixture
def plans(prepared: Prepared) -> list[Plan]:
    """Round 1 for three devices."""
    return prepared.method.plan(prepared.setup, prepared.state, 1, [0, 1, 3])
