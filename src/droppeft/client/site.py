"""Make a client of a site: from its node file, the published task, and a model. Ours."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from droppeft.client.client import Client
from droppeft.client.client_model import ClientModel
from droppeft.client.node_file import NodeFile, read_node_file
from droppeft.client.published_task import PublishedTask, tokenizer_hash
from droppeft.client.site_rules import SiteRules, check_run
from droppeft.config import Config
from droppeft.data.conversations import ConversationTable
from droppeft.data.missing_values import row_numbers
from droppeft.data.site_rows import SiteRows, SiteSource
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction
from droppeft.models.loading import check_tokens
from droppeft.refusals import Refused
from droppeft.tasks.registry import task_named

_log = logging.getLogger("droppeft")


Site = tuple[NodeFile, SiteRows]
"""A site's node file and the rows that it names."""


@dataclass(frozen=True)
class RefusingSite:
    """A site that takes no part.

    Attributes:
        reason: why.
    """

    reason: Refused

    def run(self, instruction: Instruction) -> NoReturn:
        """Raise the reason.

        Raises:
            Refused: always.
        """
        raise self.reason


def read_site(node: NodeFile, task: str, label_names: Sequence[str] | None) -> SiteRows:
    """Read the rows of a site.

    Args:
        node: the site's node file.
        task: the setting ``task``.
        label_names: names of the task's classes in their order, if it has classes; ``None`` takes
            those of the rows.

    Raises:
        DroppeftError: they cannot be read, or do not fit the task.
    """
    site = SiteSource(
        data=node.data,
        source=node.source,
        labels=node.labels,
        validation_fraction=node.split.validation_fraction,
        test_fraction=node.split.test_fraction,
    )
    return task_named(task).read_site(site, label_names)


def _log_unknown(node: NodeFile, found: SiteRows) -> None:
    for one in found.unknown:
        _log.warning(
            "client %d: %s of %s%s, left out: the label %s is no class of the task",
            node.client,
            row_numbers(one.rows),
            one.where,
            one.numbering,
            one.label,
        )


def refusal_of(node: NodeFile, found: SiteRows) -> Refused | None:
    """Return why a site takes no part with its rows; ``None`` if it does."""
    if len(found) < node.split.min_rows:
        return Refused("too_few_rows", node.split.min_rows)
    if not all(len(part) for part in found.rows.parts):
        return Refused("cannot_split")
    return None


def other_model(task: PublishedTask, weights_hash: str, tokenizer: Any) -> Refused | None:
    """Return why a site's model cannot be used for a task; ``None`` if it is the server's."""
    if weights_hash != task.model_hash:
        return Refused("other_model")
    if tokenizer_hash(tokenizer) != task.tokenizer_hash:
        return Refused("other_tokenizer")
    return None


def site_client(node: NodeFile, task: PublishedTask, model: ClientModel, config: Config) -> Client:
    """Make the client of a site.

    Args:
        node: the site's node file.
        task: what is learnt, as the server published it.
        model: of this process.
        config: of the run; it says how texts are tokenised.

    Raises:
        Refused: the site has too few rows, or another model or tokenizer than the server.
        DroppeftError: its rows cannot be read, or do not fit the task or the model.
    """
    if reason := other_model(task, model.weights_hash, model.tokenizer):
        raise reason
    return with_rows(node, read_site(node, task.task, task.label_names), model, config)


def with_rows(node: NodeFile, found: SiteRows, model: ClientModel, config: Config) -> Client:
    """Make the client of a site whose rows have been read, and log which of them are left out.

    Raises:
        Refused: there are too few rows, or the site does not run the method.
        DroppeftError: they do not fit the model.
    """
    check_run(node, config.task, config.method)
    _log_unknown(node, found)
    if reason := refusal_of(node, found):
        _log.warning("client %d: %d rows are of this task", node.client, len(found))
        raise reason
    rows = task_named(config.task).encode(found.table, model.tokenizer, config)
    check_tokens(model.model, int(rows.columns["input_ids"].max()))
    texts = found.table if isinstance(found.table, ConversationTable) else None
    return Client(model, rows, found.rows, texts, SiteRules.of(node))


def read_sites(paths: Sequence[str], task: str, label_names: Sequence[str]) -> tuple[Site, ...]:
    """Read the node files of all clients and the rows that they name, in the order of the clients.

    Args:
        paths: of the node files.
        task: the setting ``task``.
        label_names: names of the task's classes in their order, if it has classes.

    Raises:
        DroppeftError: a file cannot be read or does not fit the task, or the node files do not have
            the numbers of clients from 0 on, each once.
    """
    nodes = [read_node_file(Path(path)) for path in paths]
    _check_numbers(nodes)
    nodes.sort(key=lambda node: node.client)
    return tuple((node, read_site(node, task, label_names)) for node in nodes)


def _check_numbers(nodes: Sequence[NodeFile]) -> None:
    numbers = [node.client for node in nodes]
    for number in range(len(nodes)):
        if (count := numbers.count(number)) != 1:
            found = "none has" if not count else f"{count} have"
            raise DroppeftError(
                f"sites: of {len(nodes)} node files {found} client = {number}; give the clients "
                f"0 to {len(nodes) - 1} one file each"
            )
