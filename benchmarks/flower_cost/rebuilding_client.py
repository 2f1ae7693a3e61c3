"""A ClientApp that builds its model in every call, as Flower's examples do; for flower_cost.py.

Texts and tokens stay cached, as a FederatedDataset in a module's global does. It is a module of its
own because Ray would send the functions of a script anew, cache and all, with every message.
"""

import functools
import json

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from droppeft import seeds
from droppeft.config import build_config
from droppeft.federation.device import take_turn
from droppeft.federation.flower.client_app import introduce
from droppeft.federation.flower.messages import packed_of, record_of
from droppeft.federation.flower.packing import pack_reply, unpack_plan
from droppeft.federation.loading import Loaded, Site, load, site_of
from droppeft.federation.workbench import Workbench
from droppeft.models import load_backbone

app = ClientApp()
app.query()(introduce)


@app.train()
def rebuild_and_answer(message: Message, context: Context) -> Message:
    """Take a turn on a model that was built for it."""
    plan, errand = unpack_plan(packed_of(message.content))
    loaded, site = texts(json.dumps(errand.config))
    config = loaded.config
    head_seed = seeds.seed_for(config.seed, purpose="head")
    backbone = load_backbone(config.model, loaded.data.label_names, head_seed)
    bench = Workbench(backbone, config.accelerator, config.seed)
    update = take_turn(bench, site.table, site.devices[plan.device], config, plan)
    return Message(record_of(pack_reply(update)), reply_to=message)


@functools.lru_cache(maxsize=1)
def texts(config: str) -> tuple[Loaded, Site]:
    """Texts, split and tokens; the model that is loaded with them is not used."""
    loaded = load(build_config(json.loads(config)), lambda step: None)
    return loaded, site_of(loaded)
