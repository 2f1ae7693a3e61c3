"""The partitioners give the same rows, in the same order, as those of flwr-datasets."""

import warnings
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, PathologicalPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st

from droppeft import seeds
from droppeft.config import PartitionConfig
from droppeft.data.partition import PARTITIONERS
from droppeft.errors import DroppeftError

Labels = npt.NDArray[np.int64]

many = settings(max_examples=60)
tables = st.lists(st.integers(0, 9), min_size=12, max_size=400).map(np.array)
seed_values = st.integers(0, 2**40)


def ours(kind: str, labels: Labels, clients: int, seed: int, **changes: Any) -> list[list[int]]:
    config = PartitionConfig.model_validate({"kind": kind, **changes})
    parts = PARTITIONERS[kind](labels, None, clients, config, seed)
    assert all(part.dtype == np.int64 for part in parts)
    return [part.tolist() for part in parts]


def theirs(partitioner: Any, labels: Labels, order: Labels | None = None) -> list[list[int]]:
    order = np.arange(len(labels)) if order is None else order
    partitioner.dataset = datasets.Dataset.from_dict({"row": order, "label": labels[order]})
    parts = range(partitioner.num_partitions)
    return [list(partitioner.load_partition(part)["row"]) for part in parts]


@many
@given(labels=tables, clients=st.integers(1, 12), seed=seed_values)
def test_iid(labels: Labels, clients: int, seed: int) -> None:
    # IidPartitioner splits the table in its order, without shuffling.
    order = seeds.numpy_generator(seed, purpose="partition").permutation(len(labels))
    expected = theirs(IidPartitioner(clients), labels, order)
    assert ours("iid", labels, clients, seed) == expected


@many
@given(
    labels=tables,
    clients=st.integers(1, 12),
    seed=seed_values,
    alpha=st.sampled_from([0.01, 0.3, 1.0, 2.5, 1000.0]),
)
def test_dirichlet(labels: Labels, clients: int, seed: int, alpha: float) -> None:
    partitioner = DirichletPartitioner(
        num_partitions=clients,
        partition_by="label",
        alpha=alpha,
        min_partition_size=0,
        seed=seeds.seed_for(seed, purpose="partition"),
    )
    assert ours("dirichlet", labels, clients, seed, alpha=alpha) == theirs(partitioner, labels)


@many
@given(
    labels=tables,
    clients=st.integers(1, 12),
    seed=seed_values,
    classes_per_client=st.integers(1, 4),
)
def test_pathological(labels: Labels, clients: int, seed: int, classes_per_client: int) -> None:
    partitioner = PathologicalPartitioner(
        num_partitions=clients,
        partition_by="label",
        num_classes_per_partition=classes_per_client,
        class_assignment_mode="first-deterministic",
        seed=seeds.seed_for(seed, purpose="partition"),
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # about classes without a client
            expected = theirs(partitioner, labels)
    except ValueError:
        expected = []
    try:
        found = ours("pathological", labels, clients, seed, classes_per_client=classes_per_client)
    except DroppeftError:  # unlike flwr-datasets, we also refuse to leave out rows
        assert sum(map(len, expected)) < len(labels)
    else:
        assert found == expected
