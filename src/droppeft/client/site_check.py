"""What a site would do in a federation, found before it joins: ``droppeft node check``. Ours."""

from dataclasses import dataclass

from droppeft.client.node_file import NodeFile
from droppeft.client.published_task import PublishedTask
from droppeft.client.site import other_model, read_site, refusal_of
from droppeft.config import build_config
from droppeft.config.task_detection import detected_task
from droppeft.data.site_rows import SiteRows
from droppeft.data.texts import Rows
from droppeft.models.sources import find_source
from droppeft.refusals import Refused
from droppeft.tasks.registry import task_named


@dataclass(frozen=True)
class SiteCheck:
    """What was found about a site.

    Attributes:
        node: its node file.
        task: the setting ``task``, of the published task or of what the columns look like.
        found: its rows.
        lengths: tokens of each row without truncation, shape (rows,); ``None`` if the node file
            names no model.
        refusal: why the site would not take part; ``None`` if it would.
        compared: whether the model was compared with the server's.
    """

    node: NodeFile
    task: str
    found: SiteRows
    lengths: Rows | None
    refusal: Refused | None
    compared: bool


def check_site(node: NodeFile, published_task: PublishedTask | None) -> SiteCheck:
    """Read the rows of a site, and compare them and its model with a published task.

    Without a published task, its kind is that of the node file or of the columns, and its classes
    are the labels of the rows. The weights of the model are loaded only to compare them.

    Args:
        node: of the site.
        published_task: what the server has published, if it is known.

    Raises:
        DroppeftError: the rows or the model cannot be read, or do not fit the task.
    """
    source = node.source.model_dump(exclude_none=True, exclude_defaults=True)
    names = {"data": node.data, "source": source, "model": node.model or "builtin"}
    task = published_task.task if published_task else node.task or detected_task(names)
    found = read_site(node, task, published_task.label_names if published_task else None)
    other_task = Refused("other_task") if node.task not in (None, task) else None
    refusal, lengths = other_task or refusal_of(node, found), None
    if node.model is not None:
        # The hash of a model does not depend on the precision.
        config = build_config({**names, "task": task, "training": {"precision": "fp32"}})
        tokenizer = find_source(node.model).load_tokenizer()
        lengths = task_named(task).full_lengths(found.table, tokenizer, config)
        if published_task is not None:
            backbone = task_named(task).load_backbone(config, published_task.label_names, 0)
            refusal = refusal or other_model(
                published_task, backbone.weights_hash, backbone.tokenizer
            )
    compared = node.model is not None and published_task is not None
    return SiteCheck(node, task, found, lengths, refusal, compared)
