"""The head of a trained classifier, matched with the classes of the data by name; ours.

transformers keeps the rows of a head in the order in which they were trained. Data have their
classes in an order of their own, so that a row would otherwise be taken for another class.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from droppeft.errors import DroppeftError


def own_classes(config: Any, name: str) -> list[str]:
    """Return the classes of a trained model, in the order of its head's rows.

    Args:
        config: transformers' configuration, as it was saved.
        name: the setting ``model``, for the message.

    Raises:
        DroppeftError: its two tables of classes contradict each other.
    """
    names: Mapping[int, str] = config.id2label or {}
    rows: Mapping[str, Any] = config.label2id or {}
    for row, label in names.items():
        if set(rows) == set(names.values()) and str(rows[label]) != str(row):
            raise DroppeftError(
                f"model={name}: its config.json contradicts itself: the class {label!r} is "
                f"{row} in id2label and {rows[label]} in label2id; correct config.json"
            )
    return [str(names[row]) for row in sorted(names)]


def matching_rows(own: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return the row of a trained head for each class of the data; ``None`` if they do not match.

    Classes match by name, or else by name without regard to case and spaces. Where either side has
    only numbers (``LABEL_0`` or ``0``, ...), the number of a class is its row.

    Args:
        own: names of the head's C rows.
        wanted: names of the data's C classes, in the order of their indices.
    """
    for plain in (str, _folded):
        rows = {plain(label): row for row, label in enumerate(own)}
        labels = [plain(label) for label in wanted]
        if len(rows) == len(own) == len({*labels}) and set(rows) == set(labels):
            return [rows[label] for label in labels]
    unnamed = list(own) == [f"LABEL_{row}" for row in range(len(own))]
    are_numbers = {*wanted} == {str(row) for row in range(len(wanted))}
    if are_numbers and (unnamed or len(own) == len(wanted)):
        return [int(label) for label in wanted]
    return list(range(len(wanted))) if unnamed else None


def arrange_head(
    model: Any, rows: Sequence[int] | None, heads: Collection[str], name: str
) -> str | None:
    """Put the rows of a trained head into another order, or replace the head by a new one.

    Args:
        model: a sequence classifier for C classes; changed in place.
        rows: as :func:`matching_rows` returns them.
        heads: names of modules between the last layer and the classes.
        name: the setting ``model``, for the message.

    Returns:
        The part of the head that is new and must be trained, or ``None``. Its values follow from
        torch's random generator.

    Raises:
        DroppeftError: the rows have another order, and they are not those of a linear map.
    """
    if rows == sorted(rows or ()):
        return None
    found = output_map(model, heads)
    if found is None:
        raise DroppeftError(
            f"model={name}: its head has other classes than the data, or in another order, and it "
            "does not end with a linear map; give the classes the same names in data and config"
        )
    path, linear = found
    with torch.no_grad():
        if rows is None:
            fresh = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
            model._init_weights(fresh)
        else:
            fresh = linear
        chosen = torch.tensor(range(linear.out_features) if rows is None else rows)
        for old, new in zip(linear.parameters(), fresh.parameters(), strict=True):
            old.copy_(new[chosen].to(old.dtype))
    return next(part for part in path.split(".") if part in heads) if rows is None else None


def output_map(model: Any, heads: Collection[str]) -> tuple[str, nn.Linear] | None:
    """Return name and module of the linear map whose outputs are the logits, if there is one."""
    classes = model.config.num_labels
    maps = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == classes
        and set(path.split(".")) & set(heads)
    ]
    return maps[-1] if maps else None


def _folded(label: str) -> str:
    return " ".join(label.casefold().split())
