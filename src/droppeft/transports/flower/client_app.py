"""The ClientApp of a SuperNode: tells which client its node is, and runs its instructions.

Nothing is raised out of its functions, because Flower sends the text of an error to the server.
Importing this module loads neither torch nor transformers, because a SuperNode starts a new process
for every message.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from droppeft.client.node_file import read_node_file
from droppeft.refusals import Refused
from droppeft.transports.flower.model_server import ask
from droppeft.transports.flower.node_log import log_failure, refused_reply
from droppeft.transports.flower.records import packed_of, record_of
from droppeft.transports.flower.wire_format import (
    Malformed,
    Packed,
    unpack_instruction,
)

NODE_FILE = "node-file"
"""Key of the node's configuration that has the path of the site's file."""

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Tell the server which client this node is."""
    about = ConfigRecord({"client": _client(context.node_config)})
    return Message(RecordDict({"node": about}), reply_to=message)


def _client(node: Mapping[str, Any]) -> int:
    """The client of a site, or of a node of Flower's simulation; -1 if it cannot be known."""
    file = node.get(NODE_FILE)
    if not isinstance(file, str):
        return node["partition-id"] if isinstance(node.get("partition-id"), int) else -1
    try:
        return read_node_file(Path(file).expanduser()).client
    except Exception as error:
        log_failure("the node file", error)
        return -1


@app.train()
def train(message: Message, context: Context) -> Message:
    """Run one client's instruction and return its reply."""
    try:
        reply = _reply(packed_of(message.content), context.node_id, context.node_config)
    except Exception as error:
        reply = refused_reply("a message", error)
    return Message(record_of(reply), reply_to=message)


def _reply(packed: Packed, node_id: int, node: Mapping[str, Any]) -> Packed:
    node_file = node.get(NODE_FILE)
    if not isinstance(node_file, str):
        raise Refused("no_node_file")
    try:
        _, run_context = unpack_instruction(packed)
    except Malformed as error:
        raise Refused("unreadable") from error
    if run_context.model_server:
        return ask(packed, node_id, node_file)
    from droppeft.transports.flower.client_runtime import run_packed  # loads torch

    return run_packed(packed, node_file)
