"""Write the clients of a partitioned data set as sites, each with a folder of its own. Ours.

A federation can thus be tried on several processes or machines, none of which has the rows of
another. A run over these sites gives the bytes of the run that partitions the data.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from droppeft.client.run_inputs import count_clients, read_data
from droppeft.config import Config, as_tree, build_config
from droppeft.data.conversations import ConversationTable, Document
from droppeft.data.partition import partition_rows
from droppeft.data.texts import TextTable
from droppeft.errors import DroppeftError
from droppeft.methods.rules import check_settings
from droppeft.methods.without_effect import given
from droppeft.models.hardware import resolve_here

RUN, SERVER, NODE, TEST = "run.toml", "server.toml", "node.toml", "test"

OF_THE_DATA = (
    *("text", "label", "prompt", "completion", "train", "test", "max_train_rows", "max_test_rows"),
    "missing",
)
"""Settings ``source.*`` that no longer apply to the rows that are written."""


@dataclass(frozen=True)
class WrittenSites:
    """What was written.

    Attributes:
        folder: has a folder for each client, the test rows, and the settings of the run.
        rows: number of rows of each client.
        test_rows: number of rows of the server.
    """

    folder: Path
    rows: tuple[int, ...]
    test_rows: int

    def node_file(self, client: int) -> Path:
        """Return the node file of a client."""
        return self.folder / _folder_of(client, len(self.rows)) / NODE


def write_sites(config: Config, out: Path) -> WrittenSites:
    """Partition the data of a configuration, and write the rows and the node file of each client.

    Args:
        config: of a run that partitions its data.
        out: new folder.

    Raises:
        DroppeftError: the data cannot be read or partitioned, there is nothing to partition, or the
            folder exists or cannot be written.
    """
    if out.exists():
        raise DroppeftError(f"{out} exists already; choose another folder")
    check_settings(config)
    for key, value in (("partition.kind", config.partition.kind), ("method", config.method)):
        if value in ("sites", "centralised"):
            raise DroppeftError(f"{key}={value} distributes no rows over clients; leave it out")
    resolved = resolve_here(config)
    read = read_data(resolved)
    if not config.clients:
        config = count_clients(config, read)
    corpus = read.corpus
    clients = partition_rows(
        corpus.train.labels, corpus.train.keys, config.clients, config.partition, config.seed
    )
    rows = tuple(sum(map(len, one.parts)) for one in clients)
    written = WrittenSites(out, rows, len(corpus.test))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            inside = Path(scratch) / out.name
            for client, one in enumerate(clients):
                tables = {part: corpus.train.take(rows) for part, rows in vars(one).items()}
                folder = inside / _folder_of(client, len(clients))
                _write_rows(folder, tables, corpus.label_names)
                about = f"Client {client} of {len(clients)}, written by droppeft node split."
                _write_toml(folder / NODE, about, _node(client, config, resolved.model))
            _write_rows(inside / TEST, {"test": corpus.test}, corpus.label_names)
            of_run, of_server = _settings(config, written, corpus.label_names)
            _write_toml(inside / RUN, f"All sites in one process: droppeft run {out / RUN}", of_run)
            _write_toml(inside / SERVER, "The server of sites on other machines.", of_server)
            inside.replace(out)
    except OSError as error:
        raise DroppeftError(f"{out}: cannot be written ({error.strerror})") from None
    return written


def _write_rows(
    folder: Path,
    tables: Mapping[str, TextTable | ConversationTable],
    label_names: tuple[str, ...],
) -> None:
    """Write a file for each split into a new folder."""
    folder.mkdir(parents=True)
    for name, table in tables.items():
        (folder / f"{name}.jsonl").write_text(_lines(table, label_names), encoding="utf-8")


def _folder_of(client: int, clients: int) -> str:
    return f"client-{client:0{len(str(clients - 1))}}"


def _node(client: int, config: Config, model: str) -> dict[str, Any]:
    """The content of a node file: all rows are complete, and have the usual names of columns.

    Args:
        client: its number.
        config: of the run.
        model: its model, with an absolute path.
    """
    tree: dict[str, Any] = {"client": client, "data": "."}
    if Path(model).exists():
        tree["model"] = model
    if config.threads > 1:
        tree["threads"] = config.threads
    if not config.source.strip_labels:
        tree["source"] = {"strip_labels": False}
    return {**tree, "split": {"min_rows": config.partition.min_rows}}


def _settings(
    config: Config, written: WrittenSites, label_names: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the run in one process, and of the server of sites on other machines."""
    tree = as_tree(config)
    source = {key: value for key, value in tree["source"].items() if key not in OF_THE_DATA}
    if config.task == "classification":
        source["classes"] = list(label_names)
    tree |= {
        "data": str((written.folder / TEST).absolute()),
        "sites": [str(written.node_file(one).absolute()) for one in range(len(written.rows))],
        "source": source,
        "partition": {"kind": "sites"},
    }
    names = {"method": config.method, "task": config.task}
    here = _nested(names | dict(given(build_config(tree))))
    elsewhere = {key: value for key, value in here.items() if key not in ("sites", "transport")}
    return here, {**elsewhere, "clients": config.clients, "partition": {"kind": "sites"}}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *tables, name = key.split(".")
        inner = tree
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[name] = value
    return tree


def _write_toml(path: Path, about: str, tree: Mapping[str, Any]) -> None:
    path.write_text(f"# {about}\n{tomli_w.dumps(tree)}", encoding="utf-8")


def _lines(table: TextTable | ConversationTable, label_names: tuple[str, ...]) -> str:
    """Rows as JSON Lines, with the usual names of columns."""
    rows: Iterable[Mapping[str, Any]]
    if isinstance(table, ConversationTable):
        rows = (
            {"text": row.text}
            if isinstance(row, Document)
            else {"messages": [vars(message) for message in row.messages]}
            for row in table.rows
        )
    else:
        names = ("text",) if table.pairs is None else ("sentence1", "sentence2")
        texts = zip(table.texts, *([table.pairs] if table.pairs else []), strict=True)
        labels = (label_names[label] for label in table.labels)
        rows = (
            {**dict(zip(names, of_row, strict=True)), "label": label}
            for of_row, label in zip(texts, labels, strict=True)
        )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
