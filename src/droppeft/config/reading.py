"""Read a configuration from a TOML file, from ``key=value`` overrides, or from both; the overrides
win.

Keys inside a table are written with a dot: ``dropout.mean=0.5``.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from droppeft.config.schema import HALF, RIVALS, Config
from droppeft.config.table import Table
from droppeft.errors import DroppeftError


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (or none) and apply ``key=value`` overrides.

    Raises:
        DroppeftError: unreadable file, unknown key, wrong type or impossible value; the message
            names the key and, for an unknown one, the nearest that exists.
    """
    tree = read_toml(path) if path else {}
    settings = dict(parse_word(word) for word in overrides)
    for key in settings:
        _drop_rivals(tree, key)
    for key, value in settings.items():
        _insert(tree, key, value)
    return build_config(tree, f"in {path}" if path and not overrides else "")


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file into nested dictionaries, or say why not."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DroppeftError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DroppeftError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise DroppeftError(f"{path}: not valid TOML: {error}") from None


def key_of(word: str) -> str:
    """The setting that a word ``key=value`` is about."""
    return word.partition("=")[0].strip()


def parse_word(word: str) -> tuple[str, Any]:
    """Split ``key=value``; the value is read as TOML where it is TOML, else as plain text."""
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise DroppeftError(f"{word!r} is neither a .toml file nor key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        value = text
    return key.strip(), value


def build_config(tree: Mapping[str, Any], where: str = "") -> Config:
    """Validate nested dictionaries; the first mistake becomes one sentence."""
    place = f" {where}" if where else ""
    _check_keys(tree, place)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise DroppeftError(sentence(error, place)) from None


def to_toml(config: Config) -> str:
    """Every key with its value (keys without one are left out), so that the run repeats."""
    return tomli_w.dumps(as_tree(config))


def as_tree(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values, without absent keys."""
    return config.model_dump(mode="json", exclude_none=True)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def resolve(config: Config, *, cuda: bool) -> Config:
    """Replace what depends on this machine or folder (cores, accelerator, paths) by its value."""
    updates = {
        "threads": config.threads or available_cores(),
        "accelerator": ("cuda" if cuda else "cpu")
        if config.accelerator == "auto"
        else config.accelerator,
        "model": _absolute_if_there("model", config.model),
        "data": _absolute_if_there("data", config.data),
    }
    if updates["accelerator"] == "cuda" and not cuda:
        raise DroppeftError("accelerator=cuda, but torch sees no CUDA device here; use cpu")
    return config.model_copy(update=updates)


def resolve_layers(config: Config, num_layers: int) -> Config:
    """Replace ``frozen.layers=half`` by half of the model's layers, rounded down."""
    if config.frozen.layers != HALF:
        return config
    frozen = config.frozen.model_copy(update={"layers": num_layers // 2})
    return config.model_copy(update={"frozen": frozen})


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def known_keys(table: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, field) for every setting, in the order of this file."""
    for name, field in table.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Table):
            yield from known_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _absolute_if_there(key: str, name: str) -> str:
    """Expand ~ and $VARIABLES; make what exists here a full path, so the run repeats elsewhere."""
    expanded = os.path.expandvars(name)
    path = Path(expanded).expanduser()
    there = name != "builtin" and path.exists()
    if not there and (unknown := re.search(r"\$\{?(\w+)", expanded)):
        raise DroppeftError(
            f"{key}={name}: the environment has no variable {unknown[1]}; export it"
        )
    return str(path.resolve()) if there else expanded


def _drop_rivals(tree: dict[str, Any], key: str) -> None:
    table, _, leaf = key.rpartition(".")
    rivals = RIVALS.get(table, ())
    if leaf in rivals and isinstance(tree.get(table), dict):
        tree[table] = {name: value for name, value in tree[table].items() if name not in rivals}


def _insert(tree: dict[str, Any], key: str, value: Any) -> None:
    *tables, leaf = key.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise DroppeftError(f"{key}: {table} is a value, not a table")
    tree[leaf] = value


def _check_keys(tree: Mapping[str, Any], place: str) -> None:
    """Refuse the first key that does not exist, and name the nearest that does."""
    fields = dict(known_keys())
    known = set(fields)
    tables = {key.partition(".")[0] for key in known if "." in key}
    # Keys of an open table are checked by whoever reads it.
    opened = tuple(
        f"{key}." for key, field in fields.items() if get_origin(field.annotation) is dict
    )
    for key in flat(tree):
        if key not in known | tables and not key.startswith(opened):
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6) or [
                name for name in sorted(known) if name.endswith(f".{key.rpartition('.')[2]}")
            ]
            hint = f"did you mean {near[0]}?" if near else "docs/configuration.md lists all keys"
            raise DroppeftError(f"unknown key {key}{place}; {hint}")


def sentence(error: ValidationError, place: str) -> str:
    """The first mistake that pydantic found, for people."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return f"{message}{place}"
    got = "" if isinstance(first["input"], Mapping | BaseModel) else f", got {first['input']!r}"
    return f"{key}{place}: {message}{got}"
