"""Flower's ClientApp: tells which clients its node serves, and runs their instructions.

Importing this module loads neither torch nor transformers, because a SuperNode starts a new process
for every message.
"""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from droppeft.transports.flower.model_server import ask
from droppeft.transports.flower.records import packed_of, record_of
from droppeft.transports.flower.wire_format import unpack_instruction

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Tell the server which partition of the clients this node serves."""
    node = context.node_config
    about = ConfigRecord(
        {
            "partition": _int_or(node.get("partition-id"), -1),
            "partitions": _int_or(node.get("num-partitions"), 0),
        }
    )
    return Message(RecordDict({"node": about}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Run one client's instruction and return its reply."""
    packed = packed_of(message.content)
    _, run_context = unpack_instruction(packed)
    if run_context.model_server:
        reply = ask(packed, run_context, context.node_id, context.node_config)
    else:
        from droppeft.transports.flower.client_runtime import run_packed  # loads torch

        reply = run_packed(packed, context.node_config)
    return Message(record_of(reply), reply_to=message)


def _int_or(value: object, default: int) -> int:
    return value if isinstance(value, int) else default
