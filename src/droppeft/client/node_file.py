"""The file that a site writes: where its rows are, and what it allows. Ours."""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from droppeft.config.reading import first_error, known_keys, read_toml
from droppeft.config.schema import SourceConfig
from droppeft.config.table import Real, Table, TextList, Whole
from droppeft.errors import DroppeftError


class SplitRules(Table):
    """How the site's rows are split."""

    validation_fraction: Real = Field(0.1, gt=0, lt=1, description="share for validation")
    test_fraction: Real = Field(0.1, gt=0, lt=1, description="share for testing")
    min_rows: Whole = Field(20, ge=3, description="fewest rows with which the site takes part")

    @model_validator(mode="after")
    def _rows_are_left(self) -> "SplitRules":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave no training rows")
        return self


class Limits(Table):
    """How much a server may ask for; without a value there is no limit."""

    steps: Whole | None = Field(None, ge=1, description="most training steps of a round")
    seconds: Real | None = Field(None, gt=0, description="most seconds of a local training")
    disk_mb: Real | None = Field(
        None, ge=0, description="most megabytes for hidden states and for tensors that stay here"
    )
    methods: TextList | None = Field(
        None,
        description="federated methods that may be run; a list without `flora` and `fedex_lora` "
        "also refuses changes of the backbone",
    )


class Sending(Table):
    """What may leave the site beside the adapters' tensors."""

    head: bool = Field(True, description="the head, which can reveal how frequent labels are")
    measurements: bool = Field(
        True, description="losses and metrics on the site's validation and test rows"
    )


class NodeFile(Table):
    """A site: its client, its rows and its rules."""

    client: Whole = Field(ge=0, description="number of the client that this site is")
    data: str = Field(description="the site's file or folder of rows")
    task: Literal["classification", "causal_lm"] | None = Field(
        None, description="the task that its rows are for; any task if not given"
    )
    model: str | None = Field(
        None,
        description="folder in which this machine has the server's model, or its name; needed "
        "unless it is a packaged one, such as `builtin`",
    )
    threads: Whole | None = Field(None, ge=1, description="torch threads (1 if not given)")
    accelerator: Literal["cpu", "cuda"] | None = Field(None, description="hardware for training")
    source: SourceConfig = Field(default_factory=SourceConfig)
    labels: dict[str, str] = Field(
        default_factory=dict, description="the site's names of labels, and the task's names of them"
    )
    split: SplitRules = Field(default_factory=lambda: SplitRules.model_validate({}))
    limits: Limits = Field(default_factory=lambda: Limits.model_validate({}))
    send: Sending = Field(default_factory=lambda: Sending.model_validate({}))

    @model_validator(mode="after")
    def _classes_are_the_tasks(self) -> "NodeFile":
        if self.source.classes is not None:
            raise ValueError(
                "source.classes is a setting of the server; leave it out, and give other names of "
                "labels in [labels]"
            )
        return self


def read_node_file(path: Path) -> NodeFile:
    """Read a node file; its relative paths are relative to its folder.

    Raises:
        DroppeftError: the file cannot be read, a key is unknown, or a value is invalid.
    """
    tree: Mapping[str, Any] = read_toml(path)
    try:
        node = NodeFile.model_validate(tree)
    except ValidationError as error:
        raise DroppeftError(
            _unknown_key(error, path) or first_error(error, f" in {path}")
        ) from None
    folder = path.absolute().parent
    paths = {
        name: os.path.normpath(path)
        for name in ("data", "model")
        if (value := getattr(node, name)) is not None
        # The name of a model may also be that of a package or of the hub.
        and ((path := folder / Path(value).expanduser()).exists() or name != "model")
    }
    return node.model_copy(update=paths)


def _unknown_key(error: ValidationError, path: Path) -> str | None:
    """The first key that does not exist, as one sentence; ``None`` if all keys exist."""
    unknown = [
        ".".join(map(str, one["loc"])) for one in error.errors() if one["type"] == "extra_forbidden"
    ]
    if not unknown:
        return None
    known = [key for key, _ in known_keys(NodeFile)]
    leaf = unknown[0].rpartition(".")[2]
    near = [key for key in known if key.rpartition(".")[2] == leaf]
    near = near or get_close_matches(unknown[0], known, 1)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown key {unknown[0]} in {path}{hint}"
