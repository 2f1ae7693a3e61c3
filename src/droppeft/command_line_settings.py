"""Settings as words of a command: ``KEY=VALUE``, with completion and hints. Ours."""

from typing import Annotated

import typer
from click import Context, NoSuchOption, UsageError
from typer.core import TyperCommand


def setting_keys(ctx: Context, incomplete: str) -> list[str]:
    """Complete the names of settings; nothing after ``=``, where bash completes files.

    A shell puts a space after the only completion, so there are two of them.
    """
    from droppeft.config import known_keys

    groups = (given for given in ctx.params.values() if isinstance(given, list | tuple))
    before = [word for words in groups for word in words]
    if before[-1:] == ["="]:
        return []
    found = [f"{key}=" for key, _ in known_keys() if key.startswith(incomplete)]
    return found if len(found) != 1 else [*found, f"{found[0]}VALUE"]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG.toml KEY=VALUE ...", show_default=False, autocompletion=setting_keys
    ),
]


class CommandWithSettings(TyperCommand):
    """A command with settings as ``KEY=VALUE``; a setting written as an option gets a hint."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Parse as click does, and add the hint to the error about an unknown option."""
        from droppeft.config import known_keys
        from droppeft.config.other_words import KEYS

        try:
            return super().parse_args(ctx, args)
        except NoSuchOption as error:
            key = error.option_name.lstrip("-").replace("-", "_")
            if key in dict(known_keys()):
                hint = f"{key} is a setting: write {key}=VALUE, without dashes."
            elif key in KEYS:
                hint = f"No such option: {error.option_name}. Did you mean {KEYS[key]}?"
            else:
                raise
            raise UsageError(hint, ctx) from None
