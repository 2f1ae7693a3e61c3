"""Loads what a configuration names: the data, their partition into clients, and the backbone.

Server and clients load the same. :mod:`droppeft.server.prepare` adds what only the server needs,
and :func:`clients_of` what only clients need, such as the rows of sites.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from droppeft import seeds
from droppeft.cached_layers.cached_layers import delete_old_runs
from droppeft.client.client import Client
from droppeft.client.client_model import ClientModel
from droppeft.client.site import RefusingSite, Site, read_sites, with_rows
from droppeft.config import Config, resolve_clients, resolve_layers
from droppeft.data.checks import partitioned
from droppeft.data.findings import Findings
from droppeft.data.partition import (
    NO_ROWS,
    ClientRows,
    calibration_rows,
    owners_of,
    partition_rows,
    without_rows,
)
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenRows
from droppeft.errors import DroppeftError
from droppeft.extras import require
from droppeft.layer_dropout import find_blocks
from droppeft.models.loading import Backbone, check_tokens
from droppeft.models.sources import find_source
from droppeft.refusals import Refused
from droppeft.tasks.registry import task_named
from droppeft.tasks.task import Corpus, Table, Task
from droppeft.training.checkpointing import check_checkpointing

SET_ASIDE_PART = 5
"""At most one of so many training rows is set aside to measure the layers."""

Say = Callable[[str], None]
"""Reports to the user what is being done."""


@dataclass(frozen=True)
class Loaded:
    """Data, partition and model of a run.

    Attributes:
        config: the resolved configuration, with the number of frozen layers.
        task: what is learnt.
        data: rows to train and to test on.
        clients: each client's rows, in the training data or in its own; empty if the clients are
            sites on other machines.
        findings: what reading and partitioning the data found and did.
        backbone: the loaded backbone.
        model: the same backbone, with adapters attached to it.
        sites: clients on this machine with rows of their own, by number; empty if there are none.
        set_aside: training rows that no client has, on which the server measures the layers, in
            random order; empty if it measures none.
        workers: how many clients are trained at a time, each in a process of its own; 1 trains them
            in this process.
    """

    config: Config
    task: Task
    data: Corpus
    clients: tuple[ClientRows, ...]
    findings: Findings
    backbone: Backbone
    model: ClientModel
    sites: tuple[Site, ...] = ()
    workers: int = 1
    set_aside: Rows = field(default_factory=lambda: NO_ROWS)

    @cached_property
    def test(self) -> TokenRows:
        """The tokenised test rows.

        Raises:
            DroppeftError: as :func:`tokens_of`.
        """
        return tokens_of(self, self.data.test)


@dataclass(frozen=True)
class ReadData:
    """Data that have been read, for the runs that would read the same.

    Attributes:
        settings: those of :func:`what_is_read`.
        corpus: the data.
    """

    settings: tuple[Any, ...]
    corpus: Corpus


def what_is_read(config: Config) -> tuple[Any, ...]:
    """Return the settings that decide what is read."""
    only_test_rows = config.partition.kind == "sites"
    return config.task, config.data, config.source, config.partition.key, only_test_rows


def read_data(config: Config, earlier: ReadData | None = None) -> ReadData:
    """Read the data of a resolved configuration, or return those that were read earlier.

    Raises:
        DroppeftError: the data cannot be read.
    """
    settings = what_is_read(config)
    if earlier is not None and earlier.settings == settings:
        return earlier
    return ReadData(settings, task_named(config.task).read(config))


def count_clients(config: Config, data: ReadData) -> Config:
    """Return the configuration with the number of clients, which is that of the owners in the data.

    Raises:
        DroppeftError: none of the owners can be a client.
    """
    train = data.corpus.train
    keys = without_rows(train.keys, set_aside(config, train))
    owners = owners_of(keys, config.partition)
    return resolve_clients(config, len(owners))


def set_aside(config: Config, train: Table) -> Rows:
    """Return the training rows that no client gets, on which the server measures the layers.

    They are as many as the task wants, but not more than a part of the rows; none if the run
    measures no layers.
    """
    if not config.calibrates:
        return NO_ROWS
    most = len(train) // SET_ASIDE_PART
    wanted = min(task_named(config.task).calibration_rows, most)
    return calibration_rows(len(train), wanted, config.seed)


def load(config: Config, say: Say, read: ReadData | None = None) -> Loaded:
    """Load data and model.

    Sets torch to one thread first, before any tensor is created: a process that has used several
    cannot be forked. Who trains afterwards sets ``config.threads``.

    Args:
        config: the resolved configuration, with the number of clients.
        say: called with what is being done.
        read: data that have been read, which are used if they are those of the configuration.

    Raises:
        DroppeftError: something that the configuration names does not exist or does not fit.
    """
    torch.set_num_threads(1)
    say("reading data")
    task = task_named(config.task)
    data = read_data(config, read).corpus
    clients: tuple[ClientRows, ...] = ()
    findings = data.findings
    aside = NO_ROWS
    if config.partition.kind != "sites":
        train, partition = data.train, config.partition
        aside = set_aside(config, train)
        clients = partition_rows(
            train.labels, train.keys, config.clients, partition, config.seed, aside
        )
        findings = partitioned(findings, train.keys, clients, partition.min_rows, aside)
    sites = read_sites(config.sites, config.task, data.label_names)
    if sites:
        clients = tuple(found.rows for _, found in sites)
    config, backbone, model = load_model(config, data.label_names, say)
    return Loaded(config, task, data, clients, findings, backbone, model, sites, set_aside=aside)


def load_model(
    config: Config, label_names: Sequence[str], say: Say
) -> tuple[Config, Backbone, ClientModel]:
    """Load the model that a configuration names.

    Args:
        config: the resolved configuration.
        label_names: names of the task's classes, if it has classes.
        say: called with what is being done.

    Returns:
        The configuration with the number of frozen layers, the backbone, and the same backbone to
        which adapters can be attached.

    Raises:
        DroppeftError: as :func:`load`.
    """
    task = task_named(config.task)
    find_source(config.model).convert(say)
    say("loading model")
    head_seed = seeds.seed_for(config.seed, purpose="head")
    backbone = task.load_backbone(config, label_names, head_seed)
    config = resolve_layers(config, backbone.num_layers)
    _check_length(config.training.max_length, config.adapter.tokens or 0, backbone)
    if task.generates:
        _check_new_tokens(config, backbone)
        if config.evaluation.personalised_generated:
            require("llm", "evaluation.personalised_generated")
    if config.training.checkpointing:
        check_checkpointing(backbone.model, find_blocks(backbone.model)[1])
    offload = config.training.offload
    model = ClientModel(backbone, task, config.accelerator, config.seed, offload=offload)
    return config, backbone, model


def tokens_of(loaded: Loaded, table: Table) -> TokenRows:
    """Tokenise rows for the backbone.

    Raises:
        DroppeftError: a row cannot be tokenised, or the model does not know a token.
    """
    rows = loaded.task.encode(table, loaded.backbone.tokenizer, loaded.config)
    check_tokens(loaded.backbone.model, int(rows.columns["input_ids"].max()))
    return rows


def clients_of(loaded: Loaded) -> tuple[Client | RefusingSite, ...]:
    """Create all clients of the run in this process, with one model for all of them."""
    delete_old_runs()
    if loaded.config.partition.kind == "sites":
        return tuple(_of_site(site, loaded) for site in loaded.sites)
    table = tokens_of(loaded, loaded.data.train)
    texts = loaded.data.train if loaded.task.generates else None
    return tuple(Client(loaded.model, table, rows, texts) for rows in loaded.clients)


def _of_site(site: Site, loaded: Loaded) -> Client | RefusingSite:
    try:
        return with_rows(*site, loaded.model, loaded.config)
    except Refused as reason:
        return RefusingSite(reason)


def identity(loaded: Loaded) -> dict[str, str]:
    """Return hashes of what must be the same in every process of a run, resumed runs included."""
    split = hashlib.sha256()
    for rows in loaded.clients:
        for part in rows.parts:
            split.update(part.tobytes() + b"|")
    for _, site in loaded.sites:
        for content in site.table.content():
            split.update(content + b"|")
    return {
        "data_hash": loaded.data.content_hash,
        "split_hash": split.hexdigest()[:16],
        "model_hash": loaded.backbone.weights_hash,
    }


def difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Describe the first hash in which two identities differ; ``None`` if they are equal."""
    for name, hash in expected.items():
        if found.get(name) != hash:
            what = name.removesuffix("_hash")
            return f"the {what} differs (expected {hash}, found {found.get(name)})"
    return None


def _check_new_tokens(config: Config, backbone: Backbone) -> None:
    """Check that a text that is generated when the run ends leaves room for a prompt."""
    evaluation = config.evaluation
    new, counts = evaluation.max_new_tokens, ("generated", "personalised_generated")
    asking = [f"evaluation.{name}=0" for name in counts if getattr(evaluation, name)]
    if asking and new >= backbone.max_length:
        raise DroppeftError(
            f"evaluation.max_new_tokens={new} leaves none of the {backbone.max_length} positions "
            f"of model {backbone.path} to a prompt; lower it, or set {' and '.join(asking)}"
        )


def _check_length(max_length: int, tokens: int, backbone: Backbone) -> None:
    """Check that texts and virtual tokens fit into the positions of the model."""
    if max_length + tokens > backbone.max_length:
        prompt = f" and adapter.tokens={tokens}" if tokens else ""
        raise DroppeftError(
            f"training.max_length={max_length}{prompt} is more than the {backbone.max_length} "
            f"positions of model {backbone.path}; lower it"
        )
