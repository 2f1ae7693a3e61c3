"""The compose file starts what `droppeft keys` prints, with files that exist."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from droppeft.report.show_keys import (
    flower_connection,
    node_command,
    register_command,
    superexec_command,
    superlink_command,
)
from flower_example import EXAMPLE, example

FOLDER = EXAMPLE.parent / "compose"
SERVER = Path("/server")


def services() -> Any:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]


def test_the_services_run_the_commands_that_are_printed() -> None:
    commands = {name: shlex.split(service["command"]) for name, service in services().items()}
    printed = {
        "superlink": superlink_command(SERVER),
        "server": superexec_command(SERVER),
        **{
            f"client-{client}": node_command("superlink", client, node_file="/site/node.toml")
            for client in range(3)
        },
    }
    assert commands == {name: example.words(command) for name, command in printed.items()}


def test_the_files_that_are_mounted_exist_or_are_made_by_droppeft_keys() -> None:
    mounted = {one.partition(":")[0] for each in services().values() for one in each["volumes"]}
    missing = {one for one in mounted if one.startswith(".") and not (FOLDER / one).exists()}
    keys = {"./federation/server", *(f"./federation/client-{client}" for client in range(3))}
    assert missing == keys
    build = services()["superlink"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).is_file()
    assert (FOLDER / "flower.toml").read_text(encoding="utf-8") == flower_connection(SERVER)
    comment = (FOLDER / "compose.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    assert register_command(SERVER, 0).replace("client-0", "client-$n") in comment
