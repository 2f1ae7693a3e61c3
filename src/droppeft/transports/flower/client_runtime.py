"""Run packed instructions on the client's side; data and model stay loaded between them.

The same code runs in Flower's simulation, in a ClientApp on a node and in a model server.
"""

import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from droppeft.client.client import Client
from droppeft.client.run_inputs import clients_of, difference, identity, load
from droppeft.client.site import RefusingSite
from droppeft.config import build_config, resolve
from droppeft.errors import DroppeftError
from droppeft.messages import Failure, Instruction, Reply
from droppeft.transports.flower.wire_format import (
    Malformed,
    Packed,
    RunContext,
    pack_reply,
    unpack_instruction,
)

OVERRIDES = ("model", "data", "threads", "accelerator")
"""Settings that a node may override: where its copies of data and model are, and its hardware."""

_log = logging.getLogger("droppeft")


def run_packed(packed: Packed, node: Mapping[str, Any]) -> Packed:
    """Run a packed instruction and return the packed reply.

    Errors are never raised: the reply is a failure with their reason.

    Args:
        packed: the instruction and its run context, as the server sent them.
        node: the node's configuration, of which :data:`OVERRIDES` are used.
    """
    try:
        instruction, run_context = unpack_instruction(packed)
    except DroppeftError as error:
        return pack_reply(Failure(-1, f"cannot read its instruction: {error}"))
    try:
        return pack_reply(_run(instruction, run_context, node))
    except Malformed as error:
        return pack_reply(Failure(instruction.client, str(error)))


def _run(instruction: Instruction, run_context: RunContext, node: Mapping[str, Any]) -> Reply:
    try:
        return _clients(_key(run_context, node))[instruction.client].run(instruction)
    except DroppeftError as error:
        return Failure(instruction.client, str(error))
    except Exception as error:
        # An error that reached the simulation engine would cost other clients' replies too.
        _log.exception("client %d, round %d", instruction.client, instruction.round)
        return Failure(instruction.client, f"{type(error).__name__}: {error}")


def _key(run_context: RunContext, node: Mapping[str, Any]) -> str:
    """Everything that determines what :func:`_clients` loads, as JSON."""
    overrides = {name: node[name] for name in OVERRIDES if name in node}
    return json.dumps(
        [{**run_context.config, **overrides}, dict(run_context.identity)], sort_keys=True
    )


@functools.lru_cache(maxsize=1)
def _clients(key: str) -> tuple[Client | RefusingSite, ...]:
    """Load data and model of a run, once for all instructions of the run in this process.

    Raises:
        DroppeftError: data, split or model are not those of the server.
    """
    tree, expected = json.loads(key)
    config = resolve(build_config(tree), cuda=torch.cuda.is_available())
    loaded = load(config, _log.info)
    changed = difference(expected, identity(loaded))
    if changed is not None:
        raise DroppeftError(f"{changed}: this node's copy is not the server's")
    return clients_of(loaded)
