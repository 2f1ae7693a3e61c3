"""What is compared: variants, data, models and seeds, and the run of each cell; ours."""

import hashlib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from droppeft.comparison.study_files import Study, Target
from droppeft.config import Config, key_of, load_config, parse_word, read_toml, resolve, sentence
from droppeft.config.schema import RIVALS
from droppeft.config.table import Real, Table, Whole, WordList
from droppeft.errors import DroppeftError
from droppeft.methods import method_named
from droppeft.methods.rules import check_settings, reason_of, without_effect


class TargetTable(Table):
    """The accuracy whose time is asked for: a number, or what a variant ends with less some."""

    accuracy: Real | None = Field(None, gt=0, lt=1)
    variant: str | None = None
    minus: Real = Field(0.01, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> "TargetTable":
        if (self.accuracy is None) == (self.variant is None):
            raise ValueError("give target.accuracy or target.variant")
        return self


class Comparison(Table):
    """A file of ``droppeft compare``.

    Attributes:
        variants: name to settings, in the order of the table.
        settings: of all variants that heed them.
        data, models: each variant runs on each; none for what the settings say.
        data_settings: the same for one of the data; they win over ``settings``.
        baseline: the variant that others' times are divided by.
    """

    variants: Mapping[str, WordList] = Field(min_length=1)
    settings: WordList = ()
    data: WordList = ()
    models: WordList = ()
    data_settings: Mapping[str, WordList] = Field(default_factory=dict)
    seeds: tuple[Whole, ...] = Field((0, 1, 2), min_length=1)
    baseline: str | None = None
    target: TargetTable | None = None

    @field_validator("seeds", mode="before")
    @classmethod
    def _all_different(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(set(map(str, value))) < len(value):
            raise ValueError("the same seed stands there twice")
        return value

    @model_validator(mode="after")
    def _variants_exist(self) -> "Comparison":
        known = ", ".join(self.variants)
        for role, name in (("baseline", self.baseline), ("target.variant", self._target_variant)):
            if name is not None and name not in self.variants:
                raise ValueError(f"{role}={name!r} is none of the variants {known}")
        return self

    @model_validator(mode="after")
    def _settings_are_of_its_data(self) -> "Comparison":
        for name in self.data_settings:
            if name not in self.data:
                known = ", ".join(self.data) or "none is listed"
                raise ValueError(f"data_settings has {name!r}, which is none of its data ({known})")
        return self

    def study(self, definition: str = "", command: str = "") -> Study:
        """What results are read by.

        Args:
            definition: the file that it was read from; made of the settings if there is none.
            command: what was called.
        """
        tree = self.model_dump(mode="json", exclude_none=True)
        target = Target(**self.target.model_dump()) if self.target else None
        which = (tuple(self.variants), self.seeds, self.baseline, target)
        return Study(*which, definition or tomli_w.dumps(tree), (command,) if command else ())

    @property
    def _target_variant(self) -> str | None:
        return self.target.variant if self.target else None


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        member: which.
        config: of the run.
    """

    variant: str
    config: Config

    @property
    def data(self) -> str:
        """What it runs on."""
        return self.config.data

    @property
    def model(self) -> str:
        """What it runs with."""
        return self.config.model

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config.seed

    @property
    def folder(self) -> str:
        """A name that people can read, and that no other cell has."""
        parts = [self.variant, Path(self.data).name, Path(self.model).name, f"seed{self.seed}"]
        digest = hashlib.sha256(self.config.model_dump_json().encode()).hexdigest()[:8]
        return "-".join([*(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts), digest])

    @property
    def place(self) -> tuple[str, str]:
        """What its accuracy can be compared on."""
        return self.data, self.model


def read_comparison(path: Path) -> Comparison:
    """Read a TOML file.

    Raises:
        DroppeftError: it cannot be read, or says what is not possible.
    """
    return _validated(read_toml(path), f" in {path}")


def named_on_the_command_line(
    methods: Sequence[str], settings: Sequence[str], seeds: Sequence[int] | None = None
) -> Comparison:
    """Methods with their defaults, and settings for all of them that heed them.

    Raises:
        DroppeftError: an unknown method.
    """
    targets = [word for word in settings if key_of(word) == "target_accuracy"]
    variants = {method_named(name).name: [f"method={name}"] for name in methods}
    target = {"accuracy": parse_word(targets[-1])[1]} if targets else None
    tree = {"variants": variants, "settings": list(settings), "target": target}
    return _validated(tree if seeds is None else {**tree, "seeds": list(seeds)}, "")


def cells(comparison: Comparison) -> list[Cell]:
    """All runs, so ordered that variants take turns: what a machine does to one it does to all.

    Raises:
        DroppeftError: a setting that no run takes, with the variant that has it; one of all
            variants that none of them heeds; or two cells that are the same run.
    """
    _check_heeded(comparison)
    found = list(_each(comparison))
    names: dict[str, Cell] = {}
    for cell in found:
        other = names.setdefault(cell.folder.rpartition("-")[2], cell)
        if other is not cell:
            raise DroppeftError(
                f"variants {other.variant!r} and {cell.variant!r} are the same run; take one out"
            )
    return found


def _check_heeded(comparison: Comparison) -> None:
    """Refuse what is set for all members and none of them heeds, whatever they run on."""
    heeded: set[str] = set()
    ignored: dict[str, list[str]] = {}
    for on, name in itertools.product(comparison.data or (None,), comparison.variants):
        words = _common(comparison, on)
        with _said_of(name):
            reasons = _reasons(words, comparison.variants[name])
        heeded.update(word for word in words if key_of(word) not in reasons)
        for key, reason in reasons.items():
            ignored.setdefault(key, []).append(reason)
    for word in (*comparison.settings, *itertools.chain(*comparison.data_settings.values())):
        if word not in heeded and key_of(word) in ignored:
            why = " and ".join(dict.fromkeys(ignored[key_of(word)]))
            raise DroppeftError(
                f"{word}: none of {', '.join(comparison.variants)} heeds it, it has no effect with "
                f"{why}; leave it out"
            )


def _each(comparison: Comparison) -> Iterator[Cell]:
    data, models = comparison.data or (None,), comparison.models or (None,)
    for seed, on, model, name in itertools.product(
        comparison.seeds, data, models, comparison.variants
    ):
        varied = {"seed": str(seed), "data": on, "model": model}
        with _said_of(name):
            yield Cell(name, _config(_common(comparison, on), comparison.variants[name], varied))


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    """Name the member in a mistake's sentence."""
    try:
        yield
    except DroppeftError as error:
        raise DroppeftError(f"member {name!r}: {error}") from None


def _common(comparison: Comparison, on: str | None) -> list[str]:
    """Settings of all members on one of the data."""
    return _over(comparison.settings, comparison.data_settings.get(on or "", ()))


def _reasons(common: Sequence[str], own: Sequence[str]) -> dict[str, str]:
    """Common settings that have no effect on a member, each with the reason."""
    config = load_config(None, _over(common, own))
    return {
        key: reason_of(rule, config)
        for key, rule in without_effect(config).items()
        if key not in map(key_of, own)
    }


def _config(common: Sequence[str], own: Sequence[str], varied: Mapping[str, str | None]) -> Config:
    """A member's configuration of its own words, which win, and of the common ones it heeds.

    Paths are whole.
    """
    keys = {*map(key_of, common), *map(key_of, own)}
    chosen = {key: value for key, value in varied.items() if value is not None}
    for key in keys & chosen.keys():
        raise DroppeftError(f"{key} is what the comparison varies; leave it out of the settings")
    reasons = _reasons(common, own)
    heeded = [word for word in common if key_of(word) not in reasons]
    words = [*_over(heeded, own), *(f"{key}={value}" for key, value in chosen.items())]
    config = load_config(None, words)
    check_settings(config)
    here = resolve(config.model_copy(update={"accelerator": "cpu"}), cuda=False)
    return config.model_copy(update={"data": here.data, "model": here.model})


def _over(words: Sequence[str], stronger: Sequence[str]) -> list[str]:
    """Both, where those that come later win, also over rivals of theirs."""
    beaten = _rivals({*map(key_of, stronger)})
    return [*(word for word in words if key_of(word) not in beaten), *stronger]


def _rivals(keys: Collection[str]) -> set[str]:
    """Settings that cannot stand beside one of these."""
    groups = [{f"{table}.{key}" for key in names} for table, names in RIVALS.items()]
    return {rival for group in groups if group & set(keys) for rival in group}


def _validated(tree: Mapping[str, Any], place: str) -> Comparison:
    try:
        return Comparison.model_validate(tree)
    except ValidationError as error:
        raise DroppeftError(sentence(error, place)) from None
