"""What a server publishes about a task, so that sites can check their rows against it. Ours."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from droppeft.data.texts import hash_of
from droppeft.errors import DroppeftError
from droppeft.files import write_atomically

if TYPE_CHECKING:
    from droppeft.models.loading import Backbone


@dataclass(frozen=True)
class PublishedTask:
    """A task without any of its rows.

    Attributes:
        task: the setting ``task``.
        label_names: names of the classes in their order; empty for a task without classes.
        model_hash: of the backbone's weights.
        tokenizer_hash: of the backbone's tokenizer.
    """

    task: str
    label_names: tuple[str, ...]
    model_hash: str
    tokenizer_hash: str


def published(task: str, label_names: Sequence[str], backbone: "Backbone") -> PublishedTask:
    """Return what is published about a task that is learnt with a loaded model."""
    return PublishedTask(
        task, tuple(label_names), backbone.weights_hash, tokenizer_hash(backbone.tokenizer)
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of all that a fast tokenizer makes of a text: 16 hexadecimal digits."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for set_by_calls in ("truncation", "padding"):
        parts.pop(set_by_calls, None)
    content = json.dumps([parts, tokenizer.chat_template], sort_keys=True)
    return hash_of([content.encode()])


def write_task(task: PublishedTask, path: Path) -> None:
    """Write a published task as JSON."""
    text = json.dumps(asdict(task), indent=2, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def read_task(path: Path) -> PublishedTask:
    """Read a published task.

    Raises:
        DroppeftError: the file cannot be read, or is no published task.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        names = tree["label_names"]
        texts = {name: tree[name] for name in ("task", "model_hash", "tokenizer_hash")}
        if not all(isinstance(text, str) for text in (*names, *texts.values())):
            raise TypeError
        return PublishedTask(label_names=tuple(names), **texts)
    except OSError as error:
        raise DroppeftError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError):
        raise DroppeftError(
            f"{path} is no published task; give the file that the server has written with: "
            "droppeft node task"
        ) from None
