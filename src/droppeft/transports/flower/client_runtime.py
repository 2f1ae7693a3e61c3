"""A client's side of an exchange: from a packed instruction to a packed reply, keeping what was
loaded.

The same code answers in a Ray actor, in a Flower ClientApp and in a model server.
"""

import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from droppeft.client.client import Client
from droppeft.client.run_inputs import clients_of, difference, identity, load
from droppeft.config import build_config, resolve
from droppeft.errors import DroppeftError
from droppeft.messages import Failure, Instruction, Reply
from droppeft.transports.flower.strict_json import Malformed
from droppeft.transports.flower.wire_format import (
    Packed,
    RunContext,
    pack_reply,
    unpack_instruction,
)

OVERRIDES = ("model", "data", "threads", "accelerator")
"""Settings that a node may have of its own: where its copies are, and what it computes with."""

_log = logging.getLogger("droppeft")


def answer(packed: Packed, node: Mapping[str, Any]) -> Packed:
    """Take the turn that a packed instruction asks for; whatever goes wrong is a Failure, never
    raised.

    Args:
        packed: as the server sent it.
        node: the node's own configuration; of it, :data:`OVERRIDES` count here.
    """
    try:
        instruction, run_context = unpack_instruction(packed)
    except DroppeftError as error:
        return pack_reply(Failure(-1, f"cannot read its instruction: {error}"))
    try:
        return pack_reply(_reply(instruction, run_context, node))
    except Malformed as error:
        return pack_reply(Failure(instruction.client, str(error)))


def _reply(instruction: Instruction, run_context: RunContext, node: Mapping[str, Any]) -> Reply:
    try:
        return _clients(_key(run_context, node))[instruction.client].run(instruction)
    except DroppeftError as error:
        return Failure(instruction.client, str(error))
    except Exception as error:
        # One client's trouble must not reach the engine, which would lose other clients' replies.
        _log.exception("client %d, round %d", instruction.client, instruction.round)
        return Failure(instruction.client, f"{type(error).__name__}: {error}")


def _key(run_context: RunContext, node: Mapping[str, Any]) -> str:
    own = {name: node[name] for name in OVERRIDES if name in node}
    return json.dumps([{**run_context.config, **own}, dict(run_context.identity)], sort_keys=True)


@functools.lru_cache(maxsize=1)
def _clients(key: str) -> tuple[Client, ...]:
    """Load what the run names, once for all instructions of the run that this process sees.

    Raises:
        DroppeftError: it is not what the server has.
    """
    tree, expected = json.loads(key)
    config = resolve(build_config(tree), cuda=torch.cuda.is_available())
    loaded = load(config, _log.info)
    wrong = difference(expected, identity(loaded))
    if wrong is not None:
        raise DroppeftError(f"{wrong}: this node's copy is not the server's")
    return clients_of(loaded)
