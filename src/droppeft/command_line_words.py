"""The words after a command: configuration file, settings, methods and lists of numbers. Ours.

Heavy modules are imported inside functions, so that ``droppeft --help`` is quick.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from droppeft.errors import DroppeftError

if TYPE_CHECKING:
    from droppeft.comparison.grid import Comparison
    from droppeft.config import Config


def file_and_settings(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Separate the configuration file from the ``key=value`` settings.

    Raises:
        DroppeftError: there are several files, or a word is neither a ``.toml`` file nor a setting.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        odd = next((name for name in files if not name.endswith(".toml")), files[0])
        hint = _hint(odd, *files[files.index(odd) + 1 :][:1])
        raise DroppeftError(
            f"only one configuration file can be given, got {' and '.join(files)}{hint}"
        )
    if files and not files[0].endswith(".toml"):
        raise DroppeftError(f"{files[0]!r} is neither a .toml file nor key=value{_hint(*files)}")
    return (Path(files[0]) if files else None), [word for word in words if "=" in word]


def _hint(word: str, value: str = "VALUE") -> str:
    """A suggestion for a word without ``=`` that is the name of a setting or a method.

    It may also be a word of another library.
    """
    from droppeft.config import known_keys
    from droppeft.config.other_words import KEYS, meant_method
    from droppeft.methods import METHODS

    known = dict(known_keys())
    if word in METHODS or word in known:
        return f"; did you mean {f'method={word}' if word in METHODS else f'{word}={value}'}?"
    if "." in word and Path(word).is_file():
        return f"; did you mean data={word}?"
    meant = meant_method(word) or KEYS.get(word)
    return f"; did you mean {meant}?" if meant else ""


def file_methods_settings(words: Sequence[str]) -> tuple[Path | None, list[str], list[str]]:
    """Comparison file, methods and settings among the words of ``compare``.

    Raises:
        DroppeftError: there is not exactly either one file, or methods.
    """
    settings = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    files = [name for name in names if name.endswith(".toml")]
    methods = [name for name in names if name not in files]
    if len(files) > 1 or (files and (methods or settings)) or not (files or methods):
        raise DroppeftError(
            "name one .toml file, or methods and settings: droppeft compare fedlora fedra rounds=5"
        )
    return (Path(files[0]) if files else None), methods, settings


def comparison_of(
    file: Path | None,
    methods: Sequence[str],
    settings: Sequence[str],
    seeds: Sequence[int] | None,
) -> "Comparison":
    """What ``compare`` was asked for; all seeds of a file, also those that are not chosen.

    Raises:
        DroppeftError: the file or a setting is wrong, or the file lacks one of the seeds.
    """
    from droppeft.comparison.grid import named_on_the_command_line, read_comparison

    if file is None:
        return named_on_the_command_line(methods, settings, seeds)
    comparison = read_comparison(file)
    if seeds and not {*seeds} <= {*comparison.seeds}:
        chosen, known = (",".join(map(str, some)) for some in (seeds, comparison.seeds))
        raise DroppeftError(f"--seeds {chosen}: {file} has only the seeds {known}")
    return comparison


def config_to_measure(words: Sequence[str], defaults: Sequence[str]) -> "Config":
    """The configuration whose step is measured; the words win over the file and the defaults.

    Raises:
        DroppeftError: a setting is wrong, or does not change the cost of a step.
    """
    from droppeft.config import load_config
    from droppeft.methods.step_settings import STEP_METHOD, check_step_settings, step_of
    from droppeft.models.hardware import resolve_here

    path, settings = file_and_settings(words)
    check_step_settings(settings)
    config = step_of(load_config(path, [*defaults, *settings], STEP_METHOD))
    return resolve_here(config)


CALIBRATED_BY = (
    *("task", "quantization", "accelerator", "seed", "source.", "adapter."),
    *("training.batch_size", "training.max_length", "training.precision", "training.loss_on"),
    *("training.micro_batch_size", "training.checkpointing"),
)
"""Keys, or beginnings of keys, of the settings that change what ``calibrate`` measures or how."""


def calibration_words(model: str, data: str, settings: Sequence[str]) -> list[str]:
    """All words of ``calibrate`` as settings.

    Raises:
        DroppeftError: a setting does not change what is measured.
    """
    from droppeft.config import key_of

    for key in map(key_of, settings):
        if not key.startswith(CALIBRATED_BY):
            raise DroppeftError(f"{key} has no effect on what layers are worth; leave it out")
    named = {"model": model, "data": data}
    return [*(f"{key}={word.removeprefix(f'{key}=')}" for key, word in named.items()), *settings]


def drop_rates(text: str) -> list[float]:
    """The numbers of ``--rates``, separated by commas.

    Raises:
        DroppeftError: one is not a number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DroppeftError(f"--rates {text!r}: write numbers as 0,0.25,0.5") from None


def seed_numbers(text: str) -> list[int]:
    """The whole numbers of ``--seeds``, separated by commas.

    Raises:
        DroppeftError: one is not a whole number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DroppeftError(f"--seeds {text!r}: write whole numbers as 0,1,2") from None


def more_rounds(settings: Sequence[str]) -> int | None:
    """The number of rounds in the settings of ``resume``; ``None`` if there is none.

    Raises:
        DroppeftError: there is another setting, or the value is not a whole number above 0.
    """
    from droppeft.config import check_keys, parse_override

    given = dict(map(parse_override, settings))
    check_keys(given)
    for key in given.keys() - {"rounds"}:
        raise DroppeftError(
            f"{key} cannot be changed in a run that has begun, only rounds can; start a new run "
            f"with start_from=RUN and {key}={given[key]}"
        )
    rounds = given.get("rounds")
    if rounds is not None and (type(rounds) is not int or rounds < 1):
        raise DroppeftError(f"rounds={rounds}: write a whole number, 1 or more")
    return rounds
