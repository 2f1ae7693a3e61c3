"""Settings of which only one may be given."""

from collections.abc import Mapping, Sequence

# Mutually exclusive settings, by table; the first one has the default. An override replaces the
# file's choice.
EXCLUSIVE = {
    "dropout": ("mean", "count", "rates"),
    "training": ("local_steps", "local_epochs"),
}


def with_default(table: object, rivals: Sequence[str], default: object) -> object:
    """Set the first of mutually exclusive settings if none of them is given."""
    if not isinstance(table, Mapping) or any(table.get(key) is not None for key in rivals):
        return table
    return {**table, rivals[0]: default}
