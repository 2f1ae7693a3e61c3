"""Run packed instructions on a site's node; rows and model stay loaded between them.

The same code runs in a ClientApp on a node and in a model server. What a node uses is in its node
file; of the server's settings it uses those of :mod:`droppeft.client.site_config`. Only codes of
reasons leave the node, and the reasons themselves are in its log.
"""

import functools
import json
import logging
from pathlib import Path

import torch

from droppeft.cached_layers.cached_layers import delete_old_runs
from droppeft.client.client import Client
from droppeft.client.node_file import NodeFile, read_node_file
from droppeft.client.published_task import PublishedTask
from droppeft.client.run_inputs import load_model
from droppeft.client.site import site_client
from droppeft.client.site_config import site_config
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Answer
from droppeft.models.hardware import resolve_here
from droppeft.refusals import Refused
from droppeft.transports.flower.node_log import in_node_log, refused_reply
from droppeft.transports.flower.wire_format import (
    Malformed,
    Packed,
    RunContext,
    pack_reply,
    unpack_instruction,
)

_log = logging.getLogger("droppeft")


def run_packed(packed: Packed, node_file: str) -> Packed:
    """Run a packed instruction by a site's rules, and return the packed reply.

    Nothing is raised: the reply is the code of a refusal, and the node's log has the reason.

    Args:
        packed: the instruction and its run context, as the server sent them.
        node_file: path of the site's file.
    """
    what = "an instruction"
    with in_node_log():
        try:
            instruction, run_context = _unpacked(packed)
            what = f"client {instruction.client}, round {instruction.round}"
            return pack_reply(_run(instruction, run_context, node_file))
        except Exception as error:
            return refused_reply(what, error)


def _unpacked(packed: Packed) -> tuple[Instruction, RunContext]:
    try:
        return unpack_instruction(packed)
    except Malformed as error:
        raise Refused("unreadable") from error


def _run(instruction: Instruction, run_context: RunContext, node_file: str) -> Answer:
    if run_context.task is None:
        raise Refused("unreadable")
    node = read_node_file(Path(node_file).expanduser())
    if instruction.client != node.client:
        raise Refused("other_client", node.client, instruction.client)
    return _client(_key(node, run_context.task, run_context)).run(instruction)


def _key(node: NodeFile, task: PublishedTask, run_context: RunContext) -> str:
    """Everything that determines what :func:`_client` loads, as JSON."""
    return json.dumps(
        [node.model_dump(mode="json"), vars(task), dict(run_context.config)], sort_keys=True
    )


@functools.lru_cache(maxsize=1)
def _client(key: str) -> Client:
    """Load rows and model of a site, once for all instructions of the run in this process.

    Raises:
        Refused: the site does not take part, or its model is not the server's.
        DroppeftError: rows or model cannot be loaded.
    """
    of_node, of_task, settings = json.loads(key)
    node = NodeFile.model_validate(of_node)
    task = PublishedTask(**{**of_task, "label_names": tuple(of_task["label_names"])})
    config = resolve_here(site_config(settings, task, node))
    torch.set_num_threads(config.threads)
    delete_old_runs()
    config, _, model = load_model(config, task.label_names, _log.info)
    return site_client(node, task, model, config)
