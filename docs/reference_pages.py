"""Pages of the reference that are written from the command line's help and from the methods."""

from importlib.util import find_spec

from tables import NOTICE, markdown_table
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from droppeft.cli import app
from droppeft.methods import METHODS

COMMAND_LINE_HEAD = """\
# Command line

This page has the help of every command, as `droppeft COMMAND --help` prints it. The settings that
commands take as `KEY=VALUE` are listed on their [own page](settings.md).

A command exits with code 0 if it succeeded, with 2 after a mistake in its arguments, settings or
data, with 130 after Ctrl-C, and with 1 after any other failure.
"""

METHODS_HEAD = """\
# Methods

This page lists the federated methods, says what each of them does and where it differs from its
paper. The setting is `method`:

```
droppeft run method=fedlora
```

*Tables* names the optional tables of [settings](settings.md) that a method uses. A setting of
another optional table is refused. FedProx (`training.proximal`) works with every method. Server
optimisers (FedAdam, FedYogi, FedAvgM) work with methods that list `server`. [Choose a
setting](../how_to/choose_a_setting.md) says which method to begin with.
"""

MODULE = """\
## {name}

::: droppeft.methods.{module}
    options:
      members: false
      show_root_heading: false
      show_root_toc_entry: false
"""


def command_line_page() -> str:
    """The help of all commands, as Markdown."""
    command = get_command(app)
    written = get_docs_for_click(obj=command, ctx=Context(command), name="droppeft", title="")
    return "\n\n".join((NOTICE, COMMAND_LINE_HEAD + written.partition("\n")[2]))


def methods_page() -> str:
    """All methods in a table, and the description of each from its module."""
    rows = [
        (f"`{name}`", method.summary, ", ".join(f"`{table}`" for table in sorted(method.tables)))
        for name, method in METHODS.items()
    ]
    modules = {
        name: name if find_spec(f"droppeft.methods.{name}") else "other_types" for name in METHODS
    }
    parts = [
        MODULE.format(
            name=", ".join(name for name, own in modules.items() if own == module), module=module
        )
        for module in dict.fromkeys(modules.values())
    ]
    table = markdown_table(("method", "what it does", "tables"), rows)
    return f"{NOTICE}\n\n{METHODS_HEAD}\n{table}\n" + "\n".join(parts)
