"""What a server publishes about a task, so that sites can check their rows against it. Ours."""

from dataclasses import dataclass


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
