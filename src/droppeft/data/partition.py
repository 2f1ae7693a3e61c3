"""Partition the training rows among clients.

``iid``, ``dirichlet`` (arXiv:1905.12022) and ``pathological`` (arXiv:1602.05629) give the same rows
as the partitioners of flwr-datasets. ``dirichlet_by_client`` follows FedNLP (arXiv:2104.08815).
``natural`` is ours.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from droppeft import seeds
from droppeft.config import PartitionConfig
from droppeft.data.texts import Rows
from droppeft.errors import DroppeftError

Keys = Sequence[str] | None

NO_ROWS: Rows = np.zeros(0, np.int64)
"""Indices of no rows."""

FEWEST_ROWS = 3
"""Smallest ``partition.min_rows``: one row for each part."""


@dataclass(frozen=True)
class ClientRows:
    """Indices of the rows of the training table that a client holds, in three parts."""

    train: Rows
    validation: Rows
    test: Rows

    @property
    def parts(self) -> tuple[Rows, Rows, Rows]:
        """All three parts."""
        return self.train, self.validation, self.test


def partition_rows(
    labels: Rows,
    keys: Keys,
    clients: int,
    config: PartitionConfig,
    seed: int,
    set_aside: Rows = NO_ROWS,
) -> tuple[ClientRows, ...]:
    """Assign every row to one client and to one of its parts.

    If a client has fewer than ``config.min_rows`` rows, ``config.small`` decides: it receives
    random rows, each from the client that has most rows at that point, or an error is raised. The
    parts are drawn at random, and none is empty. Only ``natural`` leaves out rows: those of owners
    with fewer than ``min_rows`` rows, if ``config.small`` is ``leave_out``, and those of the owners
    with the fewest rows, if there are more owners than clients.

    Args:
        labels: class indices, shape (rows,).
        keys: owner of each row, for ``natural``.
        clients: number of clients.
        config: the settings ``partition.*``.
        seed: the seed of the run. The same arguments give the same partition.
        set_aside: rows that no client gets, as if the data did not have them.

    Raises:
        DroppeftError: if there are not enough rows, owners or classes for the clients.
    """
    rest = np.setdiff1d(np.arange(len(labels)), set_aside)
    labels, keys = labels[rest], without_rows(keys, set_aside)
    if config.kind != "natural":
        _check_enough(len(labels), clients, config.min_rows)
    owned = PARTITIONERS[config.kind](labels, keys, clients, config, seed)
    generator = seeds.numpy_generator(seed, purpose="partition parts")
    if config.small != "error":
        owned = _topped_up(owned, config.min_rows, generator)
    _check_none_small(owned, config)
    return tuple(_parts(rest[rows], config, generator) for rows in owned)


def calibration_rows(rows: int, wanted: int, seed: int) -> Rows:
    """Choose training rows on which layers are measured, in random order.

    Args:
        rows: number of training rows.
        wanted: number of rows to choose; all if there are fewer.
        seed: the seed of the run. The rows of a smaller number are the first of a larger one.
    """
    chosen: Rows = seeds.numpy_generator(seed, purpose="calibration").permutation(rows)[:wanted]
    return chosen


def without_rows(keys: Keys, rows: Rows) -> Keys:
    """Return the owners of all other rows."""
    if keys is None or not len(rows):
        return keys
    removed = {*rows.tolist()}
    return [key for row, key in enumerate(keys) if row not in removed]


def _check_enough(rows: int, clients: int, min_rows: int) -> None:
    if rows < clients * min_rows:
        changes = [f"clients={rows // min_rows}"] if rows >= min_rows else []
        if (lower := rows // clients) >= FEWEST_ROWS:
            changes.append(f"partition.min_rows={lower}")
        if not changes and rows >= FEWEST_ROWS:
            changes = [f"clients={rows // FEWEST_ROWS} partition.min_rows={FEWEST_ROWS}"]
        advice = f"set {' or '.join(changes)}, or use more data" if changes else "use more data"
        raise DroppeftError(
            f"{rows} training rows are too few for clients={clients} with partition.min_rows="
            f"{min_rows} each; {advice}"
        )


def _check_none_small(owned: Sequence[Rows], config: PartitionConfig) -> None:
    for client, rows in enumerate(owned):
        if len(rows) < config.min_rows:
            raise DroppeftError(
                f"client {client} has {len(rows)} rows, fewer than partition.min_rows="
                f"{config.min_rows}; set partition.small=merge, raise partition.alpha, or lower "
                "partition.min_rows or clients"
            )


def _topped_up(owned: Sequence[Rows], min_rows: int, generator: np.random.Generator) -> list[Rows]:
    """Move rows one by one from the client that has most to clients that have too few."""
    held = [generator.permutation(rows).tolist() for rows in owned]
    sizes = np.array([len(rows) for rows in held])
    _check_enough(int(sizes.sum()), len(held), min_rows)
    for client in np.flatnonzero(sizes < min_rows):
        while sizes[client] < min_rows:
            largest = int(sizes.argmax())
            held[client].append(held[largest].pop())
            sizes[client] += 1
            sizes[largest] -= 1
    return [np.array(rows, np.int64) for rows in held]


def _parts(rows: Rows, config: PartitionConfig, generator: np.random.Generator) -> ClientRows:
    """Split a client's rows into parts of at least one row; sizes are rounded towards train."""
    shuffled = generator.permutation(rows)
    validation = min(max(1, int(config.validation_fraction * len(rows))), len(rows) - 2)
    test = min(max(1, int(config.test_fraction * len(rows))), len(rows) - validation - 1)
    return ClientRows(
        train=shuffled[validation + test :],
        validation=shuffled[:validation],
        test=shuffled[validation : validation + test],
    )


def _iid(labels: Rows, keys: Keys, clients: int, config: PartitionConfig, seed: int) -> list[Rows]:
    order = seeds.numpy_generator(seed, purpose="partition").permutation(len(labels))
    return np.array_split(order, clients)


def _dirichlet(
    labels: Rows, keys: Keys, clients: int, config: PartitionConfig, seed: int
) -> list[Rows]:
    """Divide the rows of each class by shares from Dir(alpha), over all clients."""
    generator = seeds.numpy_generator(seed, purpose="partition")
    parts: list[list[Rows]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        shares = generator.dirichlet(np.full(clients, config.alpha))
        ends = (np.cumsum(shares) * len(rows)).astype(int)[:-1]
        for part, more in zip(parts, np.split(rows, ends), strict=True):
            part.append(more)
    return [generator.permutation(np.concatenate(part)) for part in parts]


def _pathological(
    labels: Rows, keys: Keys, clients: int, config: PartitionConfig, seed: int
) -> list[Rows]:
    """Divide the rows of each class equally among the clients that have this class."""
    classes = np.unique(labels)
    if config.classes_per_client > len(classes):
        raise DroppeftError(
            f"partition.classes_per_client={config.classes_per_client} is more than the "
            f"{len(classes)} classes of the data"
        )
    generator = seeds.numpy_generator(seed, purpose="partition")
    held = _classes_held(classes, clients, config.classes_per_client, generator)
    parts: list[list[Rows]] = [[] for _ in range(clients)]
    for label in classes:
        rows = np.flatnonzero(labels == label)
        owners = [client for client in range(clients) if label in held[client]]
        _check_enough_owners(len(owners), len(rows), len(classes), clients, config)
        for client, more in zip(owners, np.array_split(rows, len(owners)), strict=True):
            parts[client].append(more)
    return [generator.permutation(np.concatenate(part)) for part in parts]


def _classes_held(
    classes: Rows, clients: int, per_client: int, generator: np.random.Generator
) -> list[set[int]]:
    """Give client i class i (counted round and round), and draw its other classes."""
    held = []
    for client in range(clients):
        own = {int(classes[client % len(classes)])}
        while len(own) < per_client:
            own.add(int(generator.choice(classes, size=1)[0]))
        held.append(own)
    return held


def _check_enough_owners(
    owners: int, rows: int, classes: int, clients: int, config: PartitionConfig
) -> None:
    if owners > rows:
        raise DroppeftError(
            "partition.kind=pathological: a class has fewer rows than clients that need it; lower "
            "clients or partition.classes_per_client"
        )
    if owners == 0:
        raise DroppeftError(
            f"partition.kind=pathological: some of the {classes} classes have no client; raise "
            f"clients={clients} or partition.classes_per_client={config.classes_per_client}"
        )


def _dirichlet_by_client(
    labels: Rows, keys: Keys, clients: int, config: PartitionConfig, seed: int
) -> list[Rows]:
    """Draw the label distribution of each client in turn from Dir(alpha · prior), then its rows.

    All clients have the same number of rows (up to one). A class without remaining rows is removed
    from the distribution, so the last clients get the remaining rows whatever their distribution.
    """
    generator = seeds.numpy_generator(seed, purpose="partition")
    classes, counts = np.unique(labels, return_counts=True)
    left = [generator.permutation(np.flatnonzero(labels == label)).tolist() for label in classes]
    owned = []
    for client in range(clients):
        mix = generator.dirichlet(config.alpha * counts / len(labels))
        size = len(labels) // clients + (client < len(labels) % clients)
        owned.append(np.array(_draw(left, mix, size, generator), np.int64))
    return owned


def _draw(
    left: list[list[int]],
    mix: npt.NDArray[np.float64],
    size: int,
    generator: np.random.Generator,
) -> list[int]:
    """Remove ``size`` rows from ``left`` (one list per class), with class probabilities ``mix``."""
    drawn: list[int] = []
    while len(drawn) < size:
        sizes = np.array([len(rows) for rows in left])
        weights = np.where(sizes > 0, mix, 0)
        if weights.sum() == 0:
            weights = sizes
        for rows, wanted in zip(
            left, generator.multinomial(size - len(drawn), weights / weights.sum()), strict=True
        ):
            taken = min(int(wanted), len(rows))
            drawn += (rows.pop() for _ in range(taken))
    return drawn


def owners_of(keys: Keys, config: PartitionConfig) -> dict[str, int]:
    """Return the owners that can be clients of ``natural``, and the number of their rows.

    With ``small=leave_out`` they are those with ``min_rows`` rows or more.

    Raises:
        DroppeftError: the rows have no owners, or none that can be a client.
    """
    if keys is None:
        raise DroppeftError(
            "partition.kind=natural needs an owner for every row; set partition.key to its column"
        )
    sizes = Counter(keys)
    if config.small != "leave_out":
        return sizes
    large = {owner: size for owner, size in sizes.items() if size >= config.min_rows}
    if not large:
        raise DroppeftError(
            f"none of the {len(sizes):,} owners in partition.key={config.key} has "
            f"partition.min_rows={config.min_rows} rows (the largest has "
            f"{max(sizes.values())}); lower partition.min_rows, or set partition.small=merge, "
            "which moves rows of the largest owners to the small ones"
        )
    return large


def _natural(
    labels: Rows, keys: Keys, clients: int, config: PartitionConfig, seed: int
) -> list[Rows]:
    """Make the owners with the most rows the clients, ordered by name."""
    sizes = owners_of(keys, config)
    if len(sizes) < clients:
        enough = (
            f" with partition.min_rows={config.min_rows} rows"
            if config.small == "leave_out"
            else ""
        )
        raise DroppeftError(
            f"partition.key={config.key} has {len(sizes)} owners{enough}, fewer than "
            f"clients={clients}; leave clients out to use all of them"
        )
    largest = sorted(sizes, key=lambda owner: (-sizes[owner], owner))[:clients]
    held: dict[str, list[int]] = {owner: [] for owner in sorted(largest)}
    for row, owner in enumerate(keys or ()):
        if owner in held:
            held[owner].append(row)
    return [np.array(rows, np.int64) for rows in held.values()]


Partitioner = Callable[[Rows, Keys, int, PartitionConfig, int], list[Rows]]

PARTITIONERS: dict[str, Partitioner] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "dirichlet_by_client": _dirichlet_by_client,
    "pathological": _pathological,
    "natural": _natural,
}
"""By name, a function that returns the rows of each client, one array per client."""
