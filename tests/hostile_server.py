"""What a hostile server can ask a site for, and what happens.

``python tests/hostile_server.py`` writes what happens to ``docs/hostile_server.json``, from which
``docs/concepts/privacy.md`` is made. A test compares.
"""

import csv
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from droppeft.client.site_config import published_settings
from droppeft.messages.instruction import (
    BaseDelta,
    Budget,
    Instruction,
    LayerAdapter,
    SharingRule,
    TextGeneration,
)
from droppeft.messages.reply import Failure
from droppeft.messages.tensors import flatten
from droppeft.server.prepare import Prepared
from droppeft.transports.flower.client_runtime import run_packed
from droppeft.transports.flower.wire_format import (
    Packed,
    RunContext,
    pack_instruction,
    unpack_reply,
)
from runs import TOPICS, published_for

FILE = Path(__file__).parents[1] / "docs" / "hostile_server.json"

SECRETS = ("canarytext", "canarycell", "canarycolumn", "canarylabel", "canarypath", "canaryvar")
"""A word of the site's texts, a cell and the name of a column, a label that is no class of the
task, a folder, the value of a variable."""

Ask = tuple[Instruction, RunContext]


@dataclass(frozen=True)
class Probe:
    """Something that a server asks for.

    Attributes:
        group: what it is about.
        what: what is asked for, for readers.
        change: of an honest instruction and its run context.
        before: instructions that are run before, made of the same honest one.
        node: lines of the site's node file, beside those that it needs.
    """

    group: str
    what: str
    change: Callable[[Ask], Ask | Packed]
    before: Sequence[Callable[[Instruction], Instruction]] = ()
    node: str = ""


@dataclass(frozen=True)
class Site:
    """A site whose rows, columns and folder have the words of :data:`SECRETS`.

    Attributes:
        folder: of its files.
        instruction: of an honest server, for its client.
        context: of an honest server.
        model: where it has the model.
    """

    folder: Path
    instruction: Instruction
    context: RunContext
    model: str

    @classmethod
    def of(cls, prepared: Prepared, folder: Path) -> "Site":
        """Make a site for a run; its rows are of the run's task."""
        (folder / "canarypath").mkdir()
        with (folder / "canarypath" / "rows.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label", "canarycolumn"))
            for number in range(60):
                label, words = list(TOPICS.items())[number % len(TOPICS)]
                writer.writerow((f"canarytext {number} {' '.join(words)}", label, "canarycell"))
            writer.writerows((f"canarytext {number}", "canarylabel", "") for number in range(3))
        [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [1])
        context = RunContext(published_settings(prepared.config), published_for(prepared))
        return cls(folder, instruction, context, prepared.config.model)

    def outcome(self, probe: Probe) -> str:
        """Return what happens, and check that no secret is in the reply."""
        path = self._node_file(probe.node)
        for number, make in enumerate(probe.before, 1):
            honest = replace(make(self.instruction), round=number)
            run_packed(pack_instruction(honest, self.context), str(path))
        first = replace(self.instruction, round=len(probe.before) + 1)
        asked = probe.change((first, self.context))
        packed = asked if isinstance(asked, Packed) else pack_instruction(*asked)
        answer = run_packed(packed, str(path))
        for secret in SECRETS:
            assert secret not in answer.head, secret
            assert secret.encode() not in answer.tensors, secret
        reply = unpack_reply(answer, 10**8)
        return f"refused: {reply.reason}" if isinstance(reply, Failure) else "it has no effect"

    def _node_file(self, lines: str) -> Path:
        path = self.folder / "node.toml"
        model = "" if "model =" in lines else f"model = {self.model!r}\n"
        lines = lines.replace('model = ""', "")
        path.write_text(f'client = 1\ndata = "canarypath/rows.csv"\n{model}{lines}\n')
        return path


def setting(**values: Any) -> Callable[[Ask], Ask]:
    """Change settings that the server sends."""
    return lambda ask: (ask[0], replace(ask[1], config=merged(ask[1].config, values)))


def merged(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with other values."""
    return {
        **tree,
        **{
            name: merged(tree.get(name, {}), value) if isinstance(value, dict) else value
            for name, value in values.items()
        },
    }


def asking(**values: Any) -> Callable[[Ask], Ask]:
    """Change fields of the instruction."""
    return lambda ask: (replace(ask[0], **values), ask[1])


def training(**values: Any) -> Callable[[Ask], Ask]:
    return lambda ask: (replace(ask[0], training=replace(ask[0].training, **values)), ask[1])


def adapter(**values: Any) -> Callable[[Ask], Ask]:
    return lambda ask: (replace(ask[0], adapter=replace(ask[0].adapter, **values)), ask[1])


def layers(**values: Any) -> Callable[[Ask], Ask]:
    def change(ask: Ask) -> Ask:
        spec = ask[0].adapter
        layer = LayerAdapter(**{"type": "lora", **values})
        return replace(ask[0], adapter=replace(spec, layers=(layer,) * len(spec.layers))), ask[1]

    return change


def task(**values: Any) -> Callable[[Ask], Ask]:
    def change(ask: Ask) -> Ask:
        assert ask[1].task is not None
        return ask[0], replace(ask[1], task=replace(ask[1].task, **values))

    return change


def again(ask: Ask, **values: Any) -> Ask:
    """All tensors as they are, from what the client saved: a learning rate of nearly 0."""
    tiny = replace(ask[0].training, learning_rate=1e-30, head_learning_rate=1e-30, weight_decay=0.0)
    values = {"tensors": {}, "state_round": 1, **values}
    return replace(ask[0], training=tiny, **values), ask[1]


def keeps_all(honest: Instruction) -> Instruction:
    """Nothing may be sent."""
    return replace(honest, share=frozenset())


def keeps_half(honest: Instruction) -> Instruction:
    """The client chooses which half of its layers it shares."""
    return replace(honest, sharing=HALF)


def keeps_its_own(honest: Instruction) -> Instruction:
    """All is shared, and the client trains an adapter of its own besides (Ditto)."""
    return replace(honest, personal_adapter=1.0)


HALF = SharingRule("gradient_norm", 0.5, 0.1, None)


def simulating(ask: Ask) -> Ask:
    settings = {**ask[1].config, "data": "$SECRET", "sites": [], "transport": "flower"}
    return ask[0], RunContext(settings, identity={"data_hash": "0"})


def measuring(**values: Any) -> Callable[[Ask], Ask]:
    """Ask for a measurement."""
    return asking(evaluate_only=True, share=frozenset(), budget=Budget(steps=0), **values)


def wrong_shapes(ask: Ask) -> Ask:
    tensors = {
        key: {name: array[:1] for name, array in named.items()}
        for key, named in ask[0].tensors.items()
    }
    return replace(ask[0], tensors=tensors), ask[1]


def delta(ask: Ask) -> Ask:
    _, name, array = next(iter(flatten(ask[0].tensors)))
    return replace(ask[0], base_delta=BaseDelta("v", {name: array})), ask[1]


FILES, TRAINING, ROWS, KEPT, MESSAGES = (
    "files and settings",
    "the machine",
    "single rows",
    "tensors that stay",
    "the message",
)

NO_MODEL = 'model = ""'

PROBES = (
    Probe(FILES, "`data=$SECRET`, or another path", setting(data="$SECRET")),
    Probe(FILES, "`source.text`, `source.label`: other columns",
          setting(source={"text": ["canarycolumn"], "label": "$SECRET"})),
    Probe(FILES, "`start_from`, `tracker`, `sites`, `partition`, `threads`",
          setting(start_from="$SECRET", tracker="wandb", sites=["$SECRET"], threads=10**6,
                  partition={"kind": "natural", "key": "canarycolumn"})),
    Probe(FILES, "`model`: a folder, at a site that names its own", setting(model="/etc")),
    Probe(FILES, "`model`: a folder", setting(model="/etc"), node=NO_MODEL),
    Probe(FILES, "`model`: a Hub id", setting(model="someone/model"), node=NO_MODEL),
    Probe(FILES, "`model=config:$SECRET`", setting(model="config:$SECRET"), node=NO_MODEL),
    Probe(FILES, "a setting that does not exist", setting(trust_remote_code=True)),
    Probe(FILES, "a value that its setting cannot have",
          setting(training={"max_length": "$SECRET"})),
    Probe(FILES, "an option of PEFT that names a file",
          lambda ask: adapter(options=(("tokenizer_name_or_path", "/etc"),), tokens=4)(
              layers(type="prompt_tuning")(ask))),
    Probe(FILES, "an option of PEFT that names a Python module",
          adapter(options=(("megatron_core", "os"),))),
    Probe(FILES, "another model under the same name", task(model_hash="0")),
    Probe(FILES, "another tokenizer", task(tokenizer_hash="0")),
    Probe(TRAINING, "10^5 classes", task(label_names=tuple(map(str, range(10**5))))),
    Probe(FILES, "to learn to write the site's texts instead of their labels",
          task(task="causal_lm", label_names=()), node='task = "classification"'),
    Probe(FILES, "classes that the site's labels are not", task(label_names=("a", "b", "c"))),
    Probe(FILES, "rows of a site that cannot be read: no such column", asking(),
          node='[source]\ntext = "canarycolumn2"'),
    Probe(FILES, "rows of a site that cannot be read: a cell is empty", asking(),
          node='[source]\ntext = ["text", "canarycolumn"]'),
    Probe(TRAINING, "10^9 steps", asking(budget=Budget(steps=10**9))),
    Probe(TRAINING, "10^9 epochs", asking(budget=Budget(epochs=10**9))),
    Probe(TRAINING, "more steps than the site gives", asking(), node="[limits]\nsteps = 1"),
    Probe(TRAINING, "more epochs than its steps allow", asking(budget=Budget(epochs=1)),
          node="[limits]\nsteps = 2"),
    Probe(TRAINING, "more seconds than the site gives", asking(),
          node="[limits]\nseconds = 0.000001"),
    Probe(TRAINING, "saved tensors beyond the site's disk", asking(share=frozenset()),
          node="[limits]\ndisk_mb = 0.001"),
    Probe(TRAINING, "a rank of 10^6", layers(rank=10**6)),
    Probe(TRAINING, "10^6 virtual tokens",
          lambda ask: adapter(tokens=10**6)(layers(type="prompt_tuning")(ask))),
    Probe(TRAINING, "an option of PEFT of 10^9",
          lambda ask: adapter(options=(("n_frequency", 10**9),))(layers(type="fourierft")(ask))),
    Probe(TRAINING, "texts of 10^6 tokens", measuring(generation=TextGeneration(4, 128, 10**6))),
    Probe(TRAINING, "10^6 texts at once",
          lambda ask: training(evaluation_batch_size=10**6)(
              measuring(generation=TextGeneration(10**6, 128, 64))(ask))),
    Probe(TRAINING, "a method that the site does not allow", setting(method="flora"),
          node='[limits]\nmethods = ["fedlora"]'),
    Probe(TRAINING, "a change of the backbone by another method", delta,
          node='[limits]\nmethods = ["droppeft"]'),
    Probe(TRAINING, "an infinite learning rate", training(learning_rate=float("inf"))),
    Probe(TRAINING, "a round below 1", asking(round=-1)),
    Probe(ROWS, "a measurement on one row", measuring(validation_rows=1)),
    Probe(ROWS, "scores of a text generated for one row",
          measuring(generation=TextGeneration(1, 128, 64))),
    Probe(ROWS, "a reward on one row", asking(reward_rows=1)),
    Probe(ROWS, "an update of one row",
          lambda ask: training(batch_size=1)(asking(budget=Budget(steps=1))(ask))),
    Probe(ROWS, "a measurement, at a site that sends none", measuring(),
          node="[send]\nmeasurements = false"),
    Probe(ROWS, "a reward, at a site that sends no measurements", asking(reward_rows=8),
          node="[send]\nmeasurements = false"),
    Probe(ROWS, "scores of layers on validation rows, at the same site",
          asking(sharing=replace(HALF, criterion="cka")), node="[send]\nmeasurements = false"),
    Probe(KEPT, "the head, at a site that does not send it", asking(), node="[send]\nhead = false"),
    Probe(KEPT, "all tensors that the client kept, at a learning rate of 1e-30", again,
          before=[keeps_all]),
    Probe(KEPT, "the same tensors, trained from values of the server", asking(),
          before=[keeps_all]),
    Probe(KEPT, "layers that the client chose to keep", asking(), before=[keeps_half]),
    Probe(KEPT, "a larger fraction of layers than before",
          asking(sharing=replace(HALF, fraction=1.0)), before=[keeps_half]),
    Probe(KEPT, "tensors that the client kept, under a sharing rule",
          lambda ask: again(ask, sharing=replace(HALF, fraction=1.0)), before=[keeps_all]),
    Probe(KEPT, "the adapter that a client of Ditto trained for itself", again,
          before=[keeps_its_own]),
    Probe(KEPT, "the same, under a sharing rule",
          lambda ask: again(ask, sharing=replace(HALF, fraction=1.0)), before=[keeps_its_own]),
    Probe(KEPT, "saved tensors of another run", lambda ask: again(ask, run="beef"),
          before=[keeps_all]),
    Probe(KEPT, "saved tensors of another client", lambda ask: again(ask, client=0),
          before=[keeps_all]),
    Probe(KEPT, "a run named `../../home`", asking(run="../../home", share=frozenset())),
    Probe(MESSAGES, "to trust the server, as clients of a simulation do", simulating),
    Probe(MESSAGES, "tensors in another encoding than it says", asking(encoding="int8")),
    Probe(MESSAGES, "something that is no instruction",
          lambda ask: Packed('{"canarytext": 1}', b"")),
    Probe(MESSAGES, "tensors of other shapes", wrong_shapes),
    Probe(MESSAGES, "an adapter for another number of layers", adapter(layers=(None,) * 99)),
)  # fmt: skip


def outcomes() -> list[dict[str, str]]:
    """What happens with all of them."""
    from runs import SETTINGS, prepared_run, write_tiny_data
    from tiny import save_tiny_model

    os.environ["SECRET"] = "canaryvar"
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DROPPEFT_STATE"], os.environ["DROPPEFT_CACHE"] = f"{name}/s", f"{name}/c"
        for part in ("data", "site"):
            (folder / part).mkdir()
        model, data = save_tiny_model(folder / "model"), write_tiny_data(folder / "data")
        prepared = prepared_run(f"model={model}", f"data={data}", *SETTINGS)
        site = Site.of(prepared, folder / "site")
        for number, probe in enumerate(PROBES):
            os.environ["DROPPEFT_STATE"] = f"{name}/state-{number}"
            result = site.outcome(probe)
            found.append({"group": probe.group, "asks": probe.what, "result": result})
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(outcomes(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
