"""Clients of Flower's simulation: they run on the user's own machine, so they trust the server.

They load what the configuration names, as a run in one process does, and the reason of a failure
travels in full. A SuperNode cannot run them: their ClientApp is no value of a module that an app
could name.
"""

import functools
import json
import logging
from collections.abc import Callable

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from droppeft.client.client import Client
from droppeft.client.run_inputs import clients_of, difference, identity, load
from droppeft.client.site import RefusingSite
from droppeft.config import build_config
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Answer, Failure
from droppeft.models.hardware import resolve_here
from droppeft.refusals import Refused
from droppeft.transports.flower.records import packed_of, record_of
from droppeft.transports.flower.wire_format import (
    Malformed,
    Packed,
    RunContext,
    pack_reply,
    unpack_instruction,
)

_log = logging.getLogger("droppeft")


def simulated_app(introduce: Callable[[Message, Context], Message]) -> ClientApp:
    """Return a ClientApp for a simulation.

    Args:
        introduce: tells the server which clients a virtual node serves.
    """
    app = ClientApp()
    app.query()(introduce)
    app.train()(_train)
    return app


def _train(message: Message, context: Context) -> Message:
    return Message(record_of(run_simulated(packed_of(message.content))), reply_to=message)


def run_simulated(packed: Packed) -> Packed:
    """Run a packed instruction and return the packed reply; errors are never raised."""
    instruction, run_context = unpack_instruction(packed)
    try:
        return pack_reply(_run(instruction, run_context))
    except Malformed as error:
        return pack_reply(Failure(instruction.client, str(error)))


def _run(instruction: Instruction, run_context: RunContext) -> Answer | Refused | Failure:
    key = json.dumps([dict(run_context.config), dict(run_context.identity)], sort_keys=True)
    try:
        return _clients(key)[instruction.client].run(instruction)
    except Refused as error:
        return error
    except DroppeftError as error:
        return Failure(instruction.client, str(error))
    except Exception as error:
        # An error that reached the simulation engine would cost other clients' replies too.
        _log.exception("client %d, round %d", instruction.client, instruction.round)
        return Failure(instruction.client, f"{type(error).__name__}: {error}")


@functools.lru_cache(maxsize=1)
def _clients(key: str) -> tuple[Client | RefusingSite, ...]:
    """Load data and model of a run, once for all instructions of the run in this process.

    Raises:
        DroppeftError: data, split or model are not those of the server.
    """
    tree, expected = json.loads(key)
    config = resolve_here(build_config(tree))
    loaded = load(config, _log.info)
    torch.set_num_threads(config.threads)
    changed = difference(expected, identity(loaded))
    if changed is not None:
        raise DroppeftError(f"{changed}: the files changed while the run was going on")
    return clients_of(loaded)
