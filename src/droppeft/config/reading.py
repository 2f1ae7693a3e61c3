"""Read a configuration from a TOML file, ``key=value`` overrides, or both; overrides win.

Keys inside a table are written with a dot: ``dropout.mean=0.5``.
"""

import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from droppeft.config.defaults import DEFAULT_COHORT_SIZE, DEFAULT_METHOD
from droppeft.config.exclusive import EXCLUSIVE
from droppeft.config.frozen import HALF
from droppeft.config.other_words import meant_key
from droppeft.config.schema import Config
from droppeft.config.table import Table
from droppeft.config.task_detection import detected_task
from droppeft.errors import DroppeftError

PACKAGED = ("builtin", "mpnet", "smollm2")
"""Models and data that packages carry; a folder of the same name is given as ``./NAME``."""

TOML_HINTS = {
    "Invalid value": "; a text needs quotes",
    "Expected '=' after a key": "; a name with spaces or with letters such as ä needs quotes",
}
"""What is usually wrong, by the beginning of the parser's message."""


def load_config(
    path: Path | None, overrides: Sequence[str] = (), method: str = DEFAULT_METHOD
) -> Config:
    """Read a TOML file (or none) and apply ``key=value`` overrides.

    Args:
        path: the file, or ``None``.
        overrides: ``key=value``.
        method: the method if neither the file nor an override names one.

    Raises:
        DroppeftError: the file cannot be read, a key is unknown, or a value is invalid; the message
            names the key and, for an unknown one, the most similar that exists.
    """
    tree = read_toml(path) if path else {}
    settings = dict(map(parse_override, overrides))
    for key in settings:
        _drop_rivals(tree, key)
    for key, value in settings.items():
        _insert(tree, key, value)
    tree.setdefault("method", method)
    return config_with_task(tree, f"in {path}" if path and not overrides else "")


def config_with_task(tree: Mapping[str, Any], where: str = "") -> Config:
    """Validate nested dictionaries; without a task, it is that of the data and the model.

    Args:
        tree, where: as in :func:`build_config`.

    Raises:
        DroppeftError: the first error, as one sentence.
    """
    return build_config(tree if "task" in tree else {**tree, "task": detected_task(tree)}, where)


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file into nested dictionaries.

    Raises:
        DroppeftError: the file does not exist, cannot be read, or is not valid TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DroppeftError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DroppeftError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        hint = next((TOML_HINTS[one] for one in TOML_HINTS if str(error).startswith(one)), "")
        raise DroppeftError(f"{path}: not valid TOML: {error}{hint}") from None


def key_of(override: str) -> str:
    """The key of ``key=value``."""
    return override.partition("=")[0].strip()


def parse_override(override: str) -> tuple[str, Any]:
    """Split ``key=value``; the value is read as TOML, or as plain text if it is not TOML.

    Unlike in TOML, a number may begin with its decimal point, as in ``.5`` and ``[0, .5]``.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise DroppeftError(f"{override!r} is neither a .toml file nor key=value")
    return key.strip(), _value(text)


_BARE_POINT = re.compile(r"(?<![\w.\"'])\.(?=\d)")


def _value(text: str) -> Any:
    for toml in (text, _BARE_POINT.sub("0.", text)):
        try:
            return tomllib.loads(f"value = {toml}")["value"]
        except (tomllib.TOMLDecodeError, KeyError):
            pass
    return text


def build_config(tree: Mapping[str, Any], where: str = "") -> Config:
    """Validate nested dictionaries.

    Args:
        tree: tables and settings.
        where: is added to the message of an error, as "in run.toml".

    Raises:
        DroppeftError: the first error, as one sentence.
    """
    place = f" {where}" if where else ""
    check_keys(tree, place)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise DroppeftError(first_error(error, place)) from None


def to_toml(config: Config) -> str:
    """A TOML file with every setting that has a value, so that the run can be repeated."""
    return tomli_w.dumps(as_tree(config))


def as_tree(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values, without keys that are ``None``."""
    return config.model_dump(mode="json", exclude_none=True)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted keys."""
    flattened: dict[str, Any] = {}
    for name, value in tree.items():
        is_table = isinstance(value, Mapping)
        flattened |= flat(value, f"{prefix}{name}.") if is_table else {f"{prefix}{name}": value}
    return flattened


def resolve(config: Config, *, cuda: bool, bf16: Collection[str] = ()) -> Config:
    """Replace settings that depend on the machine or folder by their values.

    These are the accelerator, the precision, and relative paths.

    Args:
        config: of a run.
        cuda: whether torch finds a CUDA device.
        bf16: accelerators that multiply fast in bf16.

    Raises:
        DroppeftError: CUDA is asked for and not available, or a path has an unknown variable.
    """
    updates: dict[str, Any] = {
        "accelerator": ("cuda" if cuda else "cpu")
        if config.accelerator == "auto"
        else config.accelerator,
        "model": _absolute_if_exists("model", config.model),
        "data": _absolute_if_exists("data", config.data),
        "sites": tuple(_absolute_if_exists("sites", name) for name in config.sites),
        "start_from": config.start_from and _absolute_if_exists("start_from", config.start_from),
    }
    if updates["accelerator"] == "cuda" and not cuda:
        raise DroppeftError("accelerator=cuda, but torch finds no CUDA device; use cpu")
    if config.training.precision == "auto":
        precision = "bf16" if updates["accelerator"] in bf16 else "fp32"
        updates["training"] = config.training.model_copy(update={"precision": precision})
    return config.model_copy(update=updates)


def resolve_layers(config: Config, num_layers: int) -> Config:
    """Replace ``frozen.layers=half`` by half of the model's layers, rounded down."""
    if config.frozen.layers != HALF:
        return config
    frozen = config.frozen.model_copy(update={"layers": num_layers // 2})
    return config.model_copy(update={"frozen": frozen})


def resolve_clients(config: Config, owners: int) -> Config:
    """Replace ``clients=0`` by the number of owners, and the cohort size that follows from it.

    Raises:
        DroppeftError: a given cohort size or quorum is too large for so many clients.
    """
    if config.clients:
        return config
    sizes = {
        "clients": owners,
        "cohort_size": config.cohort_size or min(DEFAULT_COHORT_SIZE, owners),
    }
    return build_config(
        as_tree(config) | sizes, f"(partition.key={config.partition.key} has {owners} owners)"
    )


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def known_keys(table: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, field) for every setting, in the order of the tables."""
    for name, field in table.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Table):
            yield from known_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _absolute_if_exists(key: str, name: str) -> str:
    """Expand ~ and $VARIABLES, and make an existing path absolute."""
    expanded = os.path.expandvars(name)
    path = Path(expanded).expanduser()
    exists = name not in PACKAGED and path.exists()
    if not exists and (unknown := re.search(r"\$\{?(\w+)", expanded)):
        raise DroppeftError(
            f"{key}={name}: the environment has no variable {unknown[1]}; export it"
        )
    return str(path.resolve()) if exists else expanded


def _drop_rivals(tree: dict[str, Any], key: str) -> None:
    """Remove settings of the file that are mutually exclusive with an override."""
    table, _, leaf = key.rpartition(".")
    rivals = EXCLUSIVE.get(table, ())
    if leaf in rivals and isinstance(tree.get(table), dict):
        tree[table] = {name: value for name, value in tree[table].items() if name not in rivals}


def _insert(tree: dict[str, Any], key: str, value: Any) -> None:
    *tables, leaf = key.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise DroppeftError(f"{key}: {table} is a value, not a table")
    tree[leaf] = value


def check_keys(tree: Mapping[str, Any], place: str = "") -> None:
    """Refuse the first key that does not exist, and name the most similar that does.

    Raises:
        DroppeftError: there is such a key.
    """
    fields = dict(known_keys())
    known = set(fields)
    tables = {key.partition(".")[0] for key in known if "." in key}
    # Tables with arbitrary keys are checked where they are read.
    opened = tuple(
        f"{key}." for key, field in fields.items() if get_origin(field.annotation) is dict
    )
    for key in flat(tree):
        if key not in known and not key.startswith(opened):
            near = meant_key(key, known)
            hint = f"did you mean {near}?" if near else "list all with: droppeft settings"
            wrong = f"{key} is a table of settings" if key in tables else f"unknown key {key}"
            raise DroppeftError(f"{wrong}{place}; {hint}")


def first_error(error: ValidationError, place: str) -> str:
    """The first error that pydantic found, as one sentence.

    Args:
        error: of a table's validation.
        place: is added behind the key, as " in run.toml".
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return f"{message}{place}"
    got = "" if isinstance(first["input"], Mapping | BaseModel) else f", got {first['input']!r}"
    return f"{key}{place}: {message}{got}"
