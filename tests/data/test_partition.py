import time
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.config import PartitionConfig
from droppeft.data.partition import PARTITIONERS, ClientRows, owners_of, partition_rows
from droppeft.errors import DroppeftError

Labels = npt.NDArray[np.int64]

KINDS = tuple(PARTITIONERS)


def balanced(classes: int, rows_per_class: int) -> Labels:
    return np.repeat(np.arange(classes), rows_per_class)


def config(kind: str, **changes: Any) -> PartitionConfig:
    key = "owner" if kind == "natural" else None
    return PartitionConfig.model_validate({"kind": kind, "key": key, **changes})


def all_rows(client: ClientRows) -> npt.NDArray[np.int64]:
    return np.concatenate([client.train, client.validation, client.test])


def as_lists(clients: Sequence[ClientRows]) -> list[list[int]]:
    return [all_rows(client).tolist() for client in clients]


def owners(rows: int, clients: int) -> tuple[str, ...]:
    return tuple(f"owner {row % clients}" for row in range(rows))


def mean_largest_share(labels: Labels, clients: Sequence[ClientRows]) -> float:
    """Mean over clients of the share of their most frequent class."""
    shares = [np.bincount(labels[all_rows(client)]) / len(all_rows(client)) for client in clients]
    return float(np.mean([share.max() for share in shares]))


def test_every_kind_of_the_configuration_exists() -> None:
    kinds = set(get_args(PartitionConfig.model_fields["kind"].annotation))
    assert kinds == {*PARTITIONERS, "sites"}  # sites have rows of their own


@given(
    kind=st.sampled_from(KINDS),
    clients=st.integers(1, 8),
    spare=st.integers(0, 60),
    min_rows=st.integers(3, 9),
    alpha=st.sampled_from([0.01, 0.3, 1.0, 100.0]),
    fractions=st.sampled_from([(0.1, 0.1), (0.9, 0.05), (0.05, 0.9), (0.45, 0.45)]),
    seed=st.integers(0, 2**40),
)
def test_every_row_is_used_once_and_no_part_is_empty(
    kind: str,
    clients: int,
    spare: int,
    min_rows: int,
    alpha: float,
    fractions: tuple[float, float],
    seed: int,
) -> None:
    rows = clients * min_rows + spare
    # Two classes: `pathological` assigns both to every client, so there are always enough rows.
    labels = np.random.default_rng(seed).permutation(np.arange(rows) % 2)
    chosen = config(
        kind,
        alpha=alpha,
        min_rows=min_rows,
        validation_fraction=fractions[0],
        test_fraction=fractions[1],
    )
    parts = partition_rows(labels, owners(rows, clients), clients, chosen, seed)
    assert len(parts) == clients
    assert sorted(np.concatenate([all_rows(part) for part in parts])) == list(range(rows))
    for part in parts:
        assert len(all_rows(part)) >= min_rows
        assert min(len(part.train), len(part.validation), len(part.test)) >= 1
        assert part.train.dtype == part.validation.dtype == part.test.dtype == np.int64


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides(kind: str) -> None:
    labels = balanced(4, 100)
    keys = owners(400, 8)
    first, again, other = (
        partition_rows(labels, keys, 8, config(kind), seed) for seed in (3, 3, 4)
    )
    assert as_lists(first) == as_lists(again)
    assert [part.train.tolist() for part in first] != [part.train.tolist() for part in other]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"natural"}))
def test_another_seed_gives_clients_other_rows(kind: str) -> None:
    first, other = (
        partition_rows(balanced(4, 100), None, 8, config(kind), seed) for seed in (3, 4)
    )
    assert [set(all_rows(part)) for part in first] != [set(all_rows(part)) for part in other]


def test_parts_have_the_requested_sizes() -> None:
    chosen = config("iid", validation_fraction=0.25, test_fraction=0.15)
    for part in partition_rows(balanced(2, 100), None, 2, chosen, 0):
        assert (len(part.train), len(part.validation), len(part.test)) == (60, 25, 15)


@pytest.mark.parametrize("small", ["merge", "error"])
def test_parts_are_drawn_at_random(small: str) -> None:
    """The rows of an owner are sorted by class, but parts must have both classes."""
    labels = balanced(2, 200)
    [part] = partition_rows(labels, ("me",) * 400, 1, config("natural", small=small), 0)
    assert 0.25 < labels[part.test].mean() < 0.75
    assert 0.25 < labels[part.validation].mean() < 0.75


# What each kind means


def test_iid_is_equal_in_size_and_in_labels() -> None:
    labels = balanced(4, 500)
    parts = partition_rows(labels, None, 7, config("iid"), 0)
    sizes = [len(all_rows(part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert mean_largest_share(labels, parts) < 0.32


def test_the_two_dirichlets_differ_as_derived() -> None:
    """At alpha = 1, four equal classes and 20 clients.

    ``dirichlet``: the four class counts of a client are about independent exponentials, so its
    label distribution is uniform on the simplex. The largest of four shares is then
    (1 + 1/2 + 1/3 + 1/4) / 4 = .52 on average. ``dirichlet_by_client``: the label distribution is
    Dir(1/4, 1/4, 1/4, 1/4), concentrated at the corners. The largest share is .72 on average (from
    a simulation of 10^6 draws).
    """
    labels = balanced(4, 2000)
    shares = {
        kind: np.mean(
            [
                mean_largest_share(labels, partition_rows(labels, None, 20, config(kind), seed))
                for seed in range(6)
            ]
        )
        for kind in ("dirichlet", "dirichlet_by_client")
    }
    assert shares["dirichlet"] == pytest.approx(0.52, abs=0.04)
    assert shares["dirichlet_by_client"] == pytest.approx(0.73, abs=0.05)


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet_by_client"])
def test_a_large_alpha_is_nearly_iid_and_a_small_one_nearly_one_class(kind: str) -> None:
    labels = balanced(4, 1000)
    large = partition_rows(labels, None, 10, config(kind, alpha=1000), 0)
    small = partition_rows(labels, None, 10, config(kind, alpha=0.02), 0)
    assert mean_largest_share(labels, large) < 0.35
    # Below 1, since rows that are moved to small clients have other classes.
    assert mean_largest_share(labels, small) > 0.6


def test_dirichlet_by_client_gives_equal_sizes_and_follows_the_prior() -> None:
    labels = np.repeat([0, 1], [900, 101])
    parts = partition_rows(labels, None, 10, config("dirichlet_by_client", alpha=1000), 0)
    sizes = sorted(len(all_rows(part)) for part in parts)
    assert sizes == [100] * 9 + [101]
    first = labels[all_rows(parts[0])]
    assert first.mean() == pytest.approx(0.1, abs=0.08)


def test_pathological_clients_have_few_classes_and_no_class_is_lost() -> None:
    labels = balanced(10, 200)
    parts = partition_rows(labels, None, 20, config("pathological", classes_per_client=3), 0)
    held = [set(labels[all_rows(part)].tolist()) for part in parts]
    assert all(len(classes) == 3 for classes in held)
    assert set.union(*held) == set(range(10))


def test_pathological_gives_each_class_a_client_where_there_are_enough() -> None:
    labels = balanced(10, 50)
    parts = partition_rows(labels, None, 10, config("pathological", classes_per_client=1), 0)
    held = [set(labels[all_rows(part)].tolist()) for part in parts]
    assert held == [{label} for label in range(10)]


def test_natural_clients_are_the_largest_owners() -> None:
    keys = ("b",) * 30 + ("a",) * 25 + ("d",) * 20 + ("c",) * 20 + ("e",) * 10
    parts = partition_rows(np.zeros(105, np.int64), keys, 3, config("natural"), 0)
    held = [{keys[row] for row in all_rows(part)} for part in parts]
    assert held == [{"a"}, {"b"}, {"c"}]
    assert [len(all_rows(part)) for part in parts] == [25, 30, 20]


def test_small_owners_are_left_out_and_rows_are_not_mixed() -> None:
    keys = ("b",) * 30 + ("a",) * 25 + ("d",) * 19 + ("c",) * 3
    chosen = config("natural")
    assert owners_of(keys, chosen) == {"b": 30, "a": 25}
    parts = partition_rows(np.zeros(77, np.int64), keys, 2, chosen, 0)
    assert [{keys[row] for row in all_rows(part)} for part in parts] == [{"a"}, {"b"}]
    merged = config("natural", small="merge")
    assert as_lists(partition_rows(np.zeros(77, np.int64), keys, 2, merged, 0)) == as_lists(parts)
    assert len(owners_of(keys, merged)) == 4
    with pytest.raises(ValueError, match="small=leave_out is only for kind=natural"):
        config("iid", small="leave_out")


@given(
    rows=st.lists(st.sampled_from(["a", "b", "é", "", "ab", "0"]), min_size=6, max_size=60),
    clients=st.integers(1, 6),
)
def test_natural_finds_the_rows_of_each_owner(rows: list[str], clients: int) -> None:
    clients = min(clients, len({*rows}))
    chosen = config("natural", small="merge")
    held = PARTITIONERS["natural"](np.zeros(len(rows), np.int64), rows, clients, chosen, 0)
    largest = sorted({*rows}, key=lambda owner: (-rows.count(owner), owner))[:clients]
    expected = [np.flatnonzero(np.array(rows) == owner) for owner in sorted(largest)]
    assert [part.tolist() for part in held] == [part.tolist() for part in expected]
    assert all(part.dtype == np.int64 for part in held)


def test_ten_thousand_owners_take_no_time() -> None:
    keys = owners(200_000, 10_000)
    start = time.perf_counter()
    partition_rows(np.zeros(200_000, np.int64), keys, 10_000, config("natural"), 0)
    assert time.perf_counter() - start < 5  # comparing each owner with each row takes 15 seconds


# Small clients


def test_a_small_client_receives_rows_only_from_the_largest() -> None:
    keys = ("a",) * 5 + ("b",) * 60 + ("c",) * 40
    chosen = config("natural", min_rows=20, small="merge")
    small, largest, other = partition_rows(np.zeros(105, np.int64), keys, 3, chosen, 0)
    assert sorted(all_rows(small))[:5] == list(range(5))
    assert [len(all_rows(part)) for part in (small, largest, other)] == [20, 45, 40]
    assert {keys[row] for row in all_rows(small)} == {"a", "b"}


def test_moved_rows_are_random() -> None:
    keys = ("a",) * 5 + ("b",) * 60
    chosen = config("natural", min_rows=20, small="merge")
    small, _ = partition_rows(np.zeros(65, np.int64), keys, 2, chosen, 0)
    moved = sorted(all_rows(small))[5:]
    assert moved not in (list(range(5, 20)), list(range(50, 65)))


def test_a_small_client_can_be_an_error() -> None:
    keys = ("a",) * 60 + ("b",) * 7
    with pytest.raises(DroppeftError, match=r"client 1 has 7 rows.*set partition\.small=merge"):
        partition_rows(np.zeros(67, np.int64), keys, 2, config("natural", small="error"), 0)


@pytest.mark.parametrize(
    ("kind", "labels", "keys", "clients", "changes", "message"),
    [
        (
            "iid",
            balanced(2, 29),
            None,
            3,
            {},
            r"58 training rows are too few for clients=3 .* set clients=2 or partition.min_rows=19",
        ),
        ("natural", balanced(2, 30), None, 3, {}, "needs an owner for every row"),
        (
            *("natural", balanced(2, 30), owners(60, 2), 3, {}),
            "2 owners with partition.min_rows=20 rows, fewer than clients=3",
        ),
        (
            *("natural", balanced(2, 99), tuple(map(str, range(198))), 3, {}),
            "none of the 198 owners in partition.key=owner has partition.min_rows=20 rows",
        ),
        (
            *("natural", balanced(2, 99), tuple(map(str, range(198))), 3, {"small": "merge"}),
            "3 training rows are too few",
        ),
        ("pathological", balanced(2, 40), None, 2, {"classes_per_client": 3}, "more than the 2"),
        ("pathological", balanced(5, 40), None, 2, {}, "some of the 5 classes have no client"),
        ("pathological", np.repeat([0, 1], [99, 1]), None, 3, {}, "a class has fewer rows than"),
    ],
)
def test_impossible_partitions_are_refused(
    kind: str,
    labels: Labels,
    keys: tuple[str, ...] | None,
    clients: int,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(DroppeftError, match=message):
        partition_rows(labels, keys, clients, config(kind, **changes), 0)
