"""A ClientApp that builds its model in every call, as Flower's examples do; used by `run.py`.

Texts and tokens stay cached, as a FederatedDataset in a module's global does. It is a module of its
own because Ray would otherwise send the functions of a script, with their cache, in every message.
"""

import functools
import json
from dataclasses import replace

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from droppeft import seeds
from droppeft.client.client import Client
from droppeft.client.client_model import ClientModel
from droppeft.client.run_inputs import Loaded, clients_of, load
from droppeft.config import build_config
from droppeft.models.loading import load_backbone
from droppeft.tasks.registry import task_named
from droppeft.transports.flower.client_app import introduce
from droppeft.transports.flower.records import packed_of, record_of
from droppeft.transports.flower.wire_format import pack_reply, unpack_instruction

app = ClientApp()
app.query()(introduce)


@app.train()
def rebuild_and_answer(message: Message, context: Context) -> Message:
    """Run an instruction on a model that was built for it."""
    instruction, run_context = unpack_instruction(packed_of(message.content))
    loaded, clients = texts(json.dumps(run_context.config))
    config = loaded.config
    head_seed = seeds.seed_for(config.seed, purpose="head")
    backbone = load_backbone(config.model, loaded.data.label_names, head_seed)
    model = ClientModel(backbone, task_named(config.task), config.accelerator, config.seed)
    update = replace(clients[instruction.client], model=model).train(instruction)
    return Message(record_of(pack_reply(update)), reply_to=message)


@functools.lru_cache(maxsize=1)
def texts(config: str) -> tuple[Loaded, tuple[Client, ...]]:
    """Texts, split and tokens; the model that is loaded with them is not used."""
    loaded = load(build_config(json.loads(config)), lambda step: None)
    return loaded, clients_of(loaded)
