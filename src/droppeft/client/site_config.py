"""The configuration of a site: the server's settings of task and training, the site's own machine.

The server sends the settings of :data:`PUBLISHED` alone, and a site looks at no others. What names
a file, a column or a part of the machine comes from the node file. Ours.
"""

from collections.abc import Mapping
from typing import Any

from droppeft.client.node_file import NodeFile
from droppeft.client.published_task import PublishedTask
from droppeft.client.site_rules import check_run
from droppeft.config import Config, as_tree, build_config, flat
from droppeft.config.reading import PACKAGED
from droppeft.errors import DroppeftError
from droppeft.models.architectures import ARCHITECTURES
from droppeft.refusals import Refused

PUBLISHED = (
    *("method", "seed", "model", "quantization", "training.precision"),
    *("training.max_length", "training.loss_on", "training.checkpointing", "training.offload"),
    *("adapter.type", "adapter.tokens"),
    *("evaluation.personalised_generated", "evaluation.max_new_tokens"),
)
"""Settings of the server that a site uses, beside the task. Everything else that a client does
follows from its instruction."""

MOST_CLASSES = 10_000
"""Most classes of a task, each of which takes memory in the head."""

ANYWHERE = frozenset({*PACKAGED, *(f"config:{name}" for name in ARCHITECTURES)})
"""Models that name no file and nothing that is downloaded."""


def published_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a server sends to sites, as nested dictionaries.

    The name of a model that is a folder or a file stays on the server.
    """
    settings = _chosen(as_tree(config))
    if settings["model"] not in ANYWHERE:
        del settings["model"]
    return settings


def site_config(settings: Mapping[str, Any], task: PublishedTask, node: NodeFile) -> Config:
    """Return the configuration with which a site loads its rows and its model.

    Args:
        settings: nested dictionaries from the server, which may hold anything.
        task: what the server published.
        node: the site's file.

    Raises:
        Refused: the site does not run the method, or must say where it has the model.
        DroppeftError: a value is invalid; the message may repeat it.
    """
    chosen = _chosen(settings)
    own = {
        "task": task.task,
        "model": _model(chosen.get("model"), node),
        "data": node.data,
        "source": node.source.model_dump(exclude_none=True),
        **{name: value for name in ("threads", "accelerator") if (value := getattr(node, name))},
    }
    if len(task.label_names) > MOST_CLASSES:
        raise Refused("impossible") from DroppeftError(f"{len(task.label_names)} classes")
    config = build_config({**chosen, **own})
    check_run(node, config.task, config.method)
    return config


def _model(asked: object, node: NodeFile) -> str:
    """The site's own copy of the model, or the server's if it is of a package."""
    if node.model is not None:
        return node.model
    if isinstance(asked, str) and asked in ANYWHERE:
        return asked
    raise Refused("model_needed")


def _chosen(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The published settings of nested dictionaries."""
    found: dict[str, Any] = {}
    for key, value in flat(tree).items():
        if key in PUBLISHED:
            table, _, name = key.rpartition(".")
            (found.setdefault(table, {}) if table else found)[name] = value
    return found
