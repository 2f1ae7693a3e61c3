"""Random draws depend on their purpose, round, client and step, and on nothing else."""

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.seeds import SERVER, numpy_generator, python_generator, seed_for

small = st.integers(0, 10_000)
draws = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**63 - 1),
        "purpose": st.text(st.characters(categories=["Ll"]), min_size=1),
        "round": small,
        "client": st.integers(SERVER, 10_000),
        "step": small,
    }
)


def test_seeds_do_not_change_between_versions() -> None:
    # First 8 bytes of BLAKE2b (digest size 8) of b"0|1|2|3|gates", halved; a change here changes
    # every result file.
    assert seed_for(0, purpose="gates", round=1, client=2, step=3) == 3_029_793_032_118_884_633


@given(draws)
def test_a_seed_fits_63_bits_and_repeats(draw: dict) -> None:
    assert 0 <= seed_for(**draw) < 2**63
    assert seed_for(**draw) == seed_for(**draw)


@given(draws, draws)
def test_distinct_draws_have_distinct_seeds(one: dict, other: dict) -> None:
    assert (seed_for(**one) == seed_for(**other)) == (one == other)


@given(draws, st.sampled_from(["seed", "round", "client", "step"]), st.integers(1, 5))
def test_every_argument_counts(draw: dict, name: str, change: int) -> None:
    assert seed_for(**draw) != seed_for(**{**draw, name: draw[name] + change})


def test_different_rounds_clients_and_steps_have_different_seeds() -> None:
    grid = list(product(range(20), range(SERVER, 20), range(20)))
    seeds = {seed_for(7, purpose="x", round=r, client=c, step=s) for r, c, s in grid}
    assert len(seeds) == len(grid)


def test_the_server_is_no_client() -> None:
    assert seed_for(0, purpose="x") == seed_for(0, purpose="x", client=SERVER)
    assert seed_for(0, purpose="x") != seed_for(0, purpose="x", client=0)


@pytest.mark.parametrize("make", [numpy_generator, python_generator])
@pytest.mark.parametrize("arguments", [{"round": 1}, {"client": 1}, {"step": 1}, {"purpose": "y"}])
def test_a_generator_depends_on_every_argument(make, arguments: dict) -> None:
    plain = {"purpose": "x"}
    assert make(3, **plain).random() == make(3, **plain).random()
    assert make(3, **plain).random() != make(3, **{**plain, **arguments}).random()
    assert make(3, **plain).random() != make(4, **plain).random()


def test_generators_are_seeded_by_seed_for() -> None:
    arguments = {"purpose": "x", "round": 2, "client": 3, "step": 4}
    seed = seed_for(1, **arguments)
    assert python_generator(1, **arguments).getstate() == random.Random(seed).getstate()
    assert numpy_generator(1, **arguments).bytes(16) == np.random.default_rng(seed).bytes(16)


def test_global_generators_are_neither_read_nor_changed() -> None:
    random.seed(1)
    before = random.getstate()
    first = python_generator(0, purpose="x").random()
    numpy_generator(0, purpose="x").random()
    assert random.getstate() == before
    random.seed(2)
    assert python_generator(0, purpose="x").random() == first


def test_neighbours_are_unrelated() -> None:
    # 2,000 neighbouring generators' first uniform draws: their mean has standard deviation
    # 1/sqrt(12 * 2000) = 0.0065, a correlation between neighbours 1/sqrt(2000) = 0.022; five
    # of each.
    uniform = np.array([python_generator(0, purpose="x", step=s).random() for s in range(2000)])
    assert abs(uniform.mean() - 0.5) < 0.033
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.11


@pytest.mark.parametrize("name", ["seed", "round", "client", "step"])
def test_a_number_is_the_same_in_every_integer_type_and_no_other(name: str) -> None:
    """As text, 1.0 and True would give other seeds than 1."""
    arguments = {"seed": 1, "purpose": "gates"}
    expected = seed_for(**{**arguments, name: 1})
    assert seed_for(**{**arguments, name: np.int64(1)}) == expected
    assert seed_for(**{**arguments, name: True}) == expected
    with pytest.raises(TypeError):
        seed_for(**{**arguments, name: 1.0})
