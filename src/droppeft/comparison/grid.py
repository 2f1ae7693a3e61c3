"""The grid of a comparison: variants, data, models and seeds, with one run per cell. Ours."""

import hashlib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from droppeft.comparison.study_files import Study, Target
from droppeft.config import (
    Config,
    first_error,
    key_of,
    load_config,
    parse_override,
    read_toml,
    resolve,
)
from droppeft.config.exclusive import EXCLUSIVE
from droppeft.config.table import Real, Table, TextList, Whole
from droppeft.errors import DroppeftError
from droppeft.methods import method_named
from droppeft.methods.rules import check_settings, check_target
from droppeft.methods.without_effect import reason_of, without_effect


class TargetTable(Table):
    """The quality whose time is asked for: a value, or a variant's last one, worse by ``minus``."""

    value: Real | None = Field(None, gt=0)
    variant: str | None = None
    minus: Real = Field(0.01, ge=0, lt=1)
    metric: Literal["accuracy", "f1", "loss", "perplexity", "token_accuracy"] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "TargetTable":
        if (self.value is None) == (self.variant is None):
            raise ValueError("give target.value or target.variant")
        return self


class Comparison(Table):
    """A file of ``droppeft compare``.

    Attributes:
        variants: settings by the variant's name, in the order of the table.
        settings: for all variants that use them.
        data, models: each variant runs on each of them; if empty, the settings say which.
        data_settings: further settings by data set, which win over ``settings``.
        seeds: each variant runs with each of them.
        baseline: the variant with which the others are compared; ``fedlora`` if ``None``, or the
            first one if none has this name.
        target: the quality whose time is asked for, if any.
    """

    variants: Mapping[str, TextList] = Field(min_length=1)
    settings: TextList = ()
    data: TextList = ()
    models: TextList = ()
    data_settings: Mapping[str, TextList] = Field(default_factory=dict)
    seeds: tuple[Whole, ...] = Field((0, 1, 2), min_length=1)
    baseline: str | None = None
    target: TargetTable | None = None

    @field_validator("seeds", mode="before")
    @classmethod
    def _all_different(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(set(map(str, value))) < len(value):
            raise ValueError("a seed is listed twice")
        return value

    @model_validator(mode="after")
    def _variants_exist(self) -> "Comparison":
        known = ", ".join(self.variants)
        for role, name in (("baseline", self.baseline), ("target.variant", self._target_variant)):
            if name is not None and name not in self.variants:
                raise ValueError(f"{role}={name!r} is not one of the variants {known}")
        return self

    @model_validator(mode="after")
    def _settings_are_of_its_data(self) -> "Comparison":
        for name in self.data_settings:
            if name not in self.data:
                known = ", ".join(self.data) or "nothing is listed"
                raise ValueError(f"data_settings names {name!r}, which is not in data ({known})")
        return self

    def study(self, definition: str = "", command: str = "") -> Study:
        """The description that is stored beside the results.

        Args:
            definition: text of the file that it was read from; written from the settings if empty.
            command: the command line that was called.
        """
        tree = self.model_dump(mode="json", exclude_none=True)
        target = Target(**self.target.model_dump()) if self.target else None
        return Study(
            variants=tuple(self.variants),
            seeds=self.seeds,
            baseline=self.baseline,
            target=target,
            definition=definition or tomli_w.dumps(tree),
            commands=(command,) if command else (),
        )

    @property
    def _target_variant(self) -> str | None:
        return self.target.variant if self.target else None


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        variant: its name.
        config: configuration of the run, with absolute paths.
        data: the data set as it was given, such as ``$DROPPEFT_DATA/ag_news``.
        model: the model as it was given.
    """

    variant: str
    config: Config
    data: str
    model: str

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.seed

    @property
    def folder(self) -> str:
        """A readable name for its folder that no other cell has."""
        data, model = (Path(place).name for place in (self.config.data, self.config.model))
        parts = [self.variant, data, model, f"seed{self.seed}"]
        digest = hashlib.sha256(self.config.model_dump_json().encode()).hexdigest()[:8]
        return "-".join([*(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts), digest])


def read_comparison(path: Path) -> Comparison:
    """Read a comparison from a TOML file.

    Raises:
        DroppeftError: the file cannot be read, or is not a valid comparison.
    """
    return _validated(read_toml(path), f" in {path}")


def named_on_the_command_line(
    methods: Sequence[str], settings: Sequence[str], seeds: Sequence[int] | None = None
) -> Comparison:
    """A comparison of methods with their defaults, and settings for all methods that use them.

    Raises:
        DroppeftError: an unknown method.
    """
    targets = [setting for setting in settings if key_of(setting) == "target"]
    variants = {method_named(name).name: [f"method={name}"] for name in methods}
    target = {"value": parse_override(targets[-1])[1]} if targets else None
    tree = {"variants": variants, "settings": list(settings), "target": target}
    return _validated(tree if seeds is None else {**tree, "seeds": list(seeds)}, "")


def cells(comparison: Comparison) -> list[Cell]:
    """All runs. Variants alternate, so that changes in the machine's load affect all alike.

    Raises:
        DroppeftError: a variant has an invalid setting, a common setting has no effect on any
            variant, no model can reach the target, or two cells are the same run.
    """
    _check_common_settings(comparison)
    found = list(_each(comparison))
    target = comparison.target
    by_digest: dict[str, Cell] = {}
    for cell in found:
        if target is not None:
            check_target(target.value, cell.config.task, target.metric)
        other = by_digest.setdefault(cell.folder.rpartition("-")[2], cell)
        if other is not cell:
            raise DroppeftError(
                f"variants {other.variant!r} and {cell.variant!r} are the same run; remove one"
            )
    return found


def _check_common_settings(comparison: Comparison) -> None:
    """Refuse a setting for all variants that has no effect on any of them, on any data."""
    used: set[str] = set()
    ignored: dict[str, list[str]] = {}
    for data, name in itertools.product(comparison.data or (None,), comparison.variants):
        common = _common(comparison, data)
        with _errors_name_variant(name):
            reasons = _reasons(common, comparison.variants[name])
        used.update(setting for setting in common if key_of(setting) not in reasons)
        for key, reason in reasons.items():
            ignored.setdefault(key, []).append(reason)
    for setting in (*comparison.settings, *itertools.chain(*comparison.data_settings.values())):
        if setting not in used and key_of(setting) in ignored:
            why = " and ".join(dict.fromkeys(ignored[key_of(setting)]))
            raise DroppeftError(
                f"{setting} has no effect on any of the variants "
                f"{', '.join(comparison.variants)} (with {why}); leave it out"
            )


def _each(comparison: Comparison) -> Iterator[Cell]:
    data_sets, models = comparison.data or (None,), comparison.models or (None,)
    for seed, data, model, name in itertools.product(
        comparison.seeds, data_sets, models, comparison.variants
    ):
        varied = {"seed": str(seed), "data": data, "model": model}
        with _errors_name_variant(name):
            config = _config(_common(comparison, data), comparison.variants[name], varied)
            yield Cell(name, _with_absolute_paths(config), config.data, config.model)


@contextmanager
def _errors_name_variant(name: str) -> Iterator[None]:
    """Put the variant's name before the message of an error."""
    try:
        yield
    except DroppeftError as error:
        raise DroppeftError(f"variant {name!r}: {error}") from None


def _common(comparison: Comparison, data: str | None) -> list[str]:
    """Settings for all variants on one data set."""
    return _override(comparison.settings, comparison.data_settings.get(data or "", ()))


def _reasons(common: Sequence[str], own: Sequence[str]) -> dict[str, str]:
    """Keys of common settings that have no effect on a variant, each with the reason.

    Args:
        common: settings for all variants.
        own: the variant's own settings.
    """
    config = load_config(None, _override(common, own))
    return {
        key: reason_of(rule, config)
        for key, rule in without_effect(config).items()
        if key not in map(key_of, own)
    }


def _config(common: Sequence[str], own: Sequence[str], varied: Mapping[str, str | None]) -> Config:
    """A variant's configuration, with paths as they were given.

    Args:
        common: settings for all variants; those without effect on this one are left out.
        own: the variant's own settings, which win over the common ones.
        varied: seed, data and model of the cell; ``None`` for what the settings say.
    """
    keys = {*map(key_of, common), *map(key_of, own)}
    chosen = {key: value for key, value in varied.items() if value is not None}
    for key in keys & chosen.keys():
        raise DroppeftError(f"{key} is varied by the comparison; leave it out of the settings")
    reasons = _reasons(common, own)
    used = [setting for setting in common if key_of(setting) not in reasons]
    settings = [*_override(used, own), *(f"{key}={value}" for key, value in chosen.items())]
    config = load_config(None, settings)
    check_settings(config)
    return config


def _with_absolute_paths(config: Config) -> Config:
    resolved = resolve(config.model_copy(update={"accelerator": "cpu"}), cuda=False)
    return config.model_copy(update={"data": resolved.data, "model": resolved.model})


def _override(settings: Sequence[str], stronger: Sequence[str]) -> list[str]:
    """Both lists; a stronger setting also replaces its mutually exclusive alternatives."""
    replaced = _rivals({*map(key_of, stronger)})
    return [*(setting for setting in settings if key_of(setting) not in replaced), *stronger]


def _rivals(keys: Collection[str]) -> set[str]:
    """Settings that are mutually exclusive with one of these, these included."""
    groups = [{f"{table}.{key}" for key in names} for table, names in EXCLUSIVE.items()]
    return {rival for group in groups if group & set(keys) for rival in group}


def _validated(tree: Mapping[str, Any], place: str) -> Comparison:
    try:
        return Comparison.model_validate(tree)
    except ValidationError as error:
        raise DroppeftError(first_error(error, place)) from None
