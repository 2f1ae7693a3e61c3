"""A device's side of an exchange: from a packed Plan to a packed reply, keeping what was loaded.

The same code answers in a Ray actor, in a Flower ClientApp and in a resident process.
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
from droppeft.messages import Failure, Plan, Reply
from droppeft.transports.flower.strict_json import Malformed
from droppeft.transports.flower.wire_format import Errand, Packed, pack_reply, unpack_plan

OVERRIDES = ("model", "data", "threads", "accelerator")
"""Settings that a node may have of its own: where its copies are, and what it computes with."""

_log = logging.getLogger("droppeft")


def answer(packed: Packed, node: Mapping[str, Any]) -> Packed:
    """Take the turn that a packed Plan asks for; whatever goes wrong is a Failure, never raised.

    Args:
        packed: as the server sent it.
        node: the node's own configuration; of it, :data:`OVERRIDES` count here.
    """
    try:
        plan, errand = unpack_plan(packed)
    except DroppeftError as error:
        return pack_reply(Failure(-1, f"cannot read its Plan: {error}"))
    try:
        return pack_reply(_reply(plan, errand, node))
    except Malformed as error:
        return pack_reply(Failure(plan.device, str(error)))


def _reply(plan: Plan, errand: Errand, node: Mapping[str, Any]) -> Reply:
    try:
        return _clients(_key(errand, node))[plan.device].run(plan)
    except DroppeftError as error:
        return Failure(plan.device, str(error))
    except Exception as error:
        # One device's trouble must not reach the engine, which would lose other devices' replies.
        _log.exception("device %d, round %d", plan.device, plan.round)
        return Failure(plan.device, f"{type(error).__name__}: {error}")


def _key(errand: Errand, node: Mapping[str, Any]) -> str:
    own = {name: node[name] for name in OVERRIDES if name in node}
    return json.dumps([{**errand.config, **own}, dict(errand.identity)], sort_keys=True)


@functools.lru_cache(maxsize=1)
def _clients(key: str) -> tuple[Client, ...]:
    """Load what the run names, once for all Plans of the run that this process sees.

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
