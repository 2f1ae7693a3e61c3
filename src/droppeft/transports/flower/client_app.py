"""Flower's ClientApp: says which clients its node serves, and takes their turns.

Importing it loads neither torch nor transformers: on a SuperNode every message starts a process.
"""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from droppeft.transports.flower.model_server import ask
from droppeft.transports.flower.records import packed_of, record_of
from droppeft.transports.flower.wire_format import unpack_instruction

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Tell the server which part of the clients this node serves."""
    node = context.node_config
    about = ConfigRecord(
        {
            "partition": _whole(node.get("partition-id"), -1),
            "partitions": _whole(node.get("num-partitions"), 0),
        }
    )
    return Message(RecordDict({"node": about}), reply_to=message)


@app.train()
def turn(message: Message, context: Context) -> Message:
    """Answer one client's instruction."""
    packed = packed_of(message.content)
    _, run_context = unpack_instruction(packed)
    if run_context.model_server:
        reply = ask(packed, run_context, context.node_id, context.node_config)
    else:
        from droppeft.transports.flower.client_runtime import answer  # loads torch

        reply = answer(packed, context.node_config)
    return Message(record_of(reply), reply_to=message)


def _whole(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise
