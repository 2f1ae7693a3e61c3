"""Write the pages of this folder that are derived from the code.

``python docs/generate.py`` writes them; with ``--check`` it writes nothing and exits with 1 when
one of them is stale. A new page is a function without arguments and a line in ``PAGES``.
"""

import json
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from droppeft.config import Config, known_keys

FOLDER = Path(__file__).parent
NOTICE = "<!-- Written by docs/generate.py: change the source, not this page. -->"

TYPE_NAMES: dict[object, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
}
BOUNDS = {
    annotated_types.Ge: ("≥", "ge"),
    annotated_types.Gt: (">", "gt"),
    annotated_types.Le: ("≤", "le"),
    annotated_types.Lt: ("<", "lt"),
}

CONFIGURATION_HEAD = """\
# Configuration

A run is described by a TOML file, by `key=value` words on the command line, or by both. The words
win.

```
droppeft run my.toml rounds=50 dropout.mean=0.5
```

```toml
rounds = 50

[dropout]
mean = 0.5
```

- A key inside a table is written with a dot on the command line.
- A list is written `[0.0, 0.5, 0.5]` in both places; a list of texts may also be written `a,b` on
  the command line.
- An unknown key is an error that names the nearest one, so a typing mistake never passes for a
  default.
- Of the settings that are said to stand "instead of" another only one may be given; a word on the
  command line replaces the file's choice.
- Every run writes all values, defaults included, to `config.toml` in its result folder; that file
  repeats the run.

In the tables "–" as a default means that nothing is set.
"""


RESULTS = FOLDER.parent / "benchmarks" / "results"
ADAPTERS = FOLDER / "adapters.json"
ARCHITECTURES = FOLDER / "architectures.json"

RESULTS_HEAD = """\
# Results

Every figure here comes from a file in `benchmarks/results/`, made by the script beside it. Measured
means a real clock on the machine named; nothing on this page is modelled. Methods were run with one
seed so far: that shows that the system works, not how methods compare.
"""

FIRST_SLICE_HEAD = """\
## AG News over {devices} devices

`benchmarks/first_slice.py`: the {layers}-layer built-in model, {cohort} devices per round, {rounds}
rounds of {steps} steps, Dirichlet alpha {alpha}, one seed. `fedlora` runs all layers, `droppeft`
drops exactly 2 in every step. The two take turns round by round on one machine: {place}.

![Accuracy against wall time of both methods](figures/first_slice.png)
"""

HEAD_RATE_HEAD = """\
## A learning rate for the head

`benchmarks/head_learning_rate.py`: centralised training of the built-in model on the built-in data,
full depth, {seeds} seeds; mean and standard deviation of the accuracy on its test texts. Made on
{place}.
"""

FLOWER_HEAD = """\
## One configuration in three places

`benchmarks/flower_cost.py`: the built-in model and data, {nodes} devices, all of them in each of
{rounds} rounds; the SuperLink and its {nodes} SuperNodes are on loopback. All measured, medians of
{runs} runs that take turns, on {place}.
The hash is over all files of `adapter/`: it is the same everywhere, or the script stops.
"""

FLOWER_COST_HEAD = """\
### What a client-round costs

One device, {rounds} rounds of 10 steps of 16 texts; {runs} runs per arm that take turns. A
client-round is a round less evaluation and saving; "beside the turn" is what is not spent in
setting values, training and packing on the device. "Model built per message" is the usual pattern
of Flower's examples: the ClientApp builds its model whenever it is called. In a simulation the
process stays and the texts with it; on a SuperNode every message has a new process, which loads
everything. The built-in model is small (22 M parameters); what building one costs grows with it.
"""


PAPERS = {
    "arXiv": "https://arxiv.org/abs/",
    "openreview": "https://openreview.net/forum?id=",
    "doi": "https://doi.org/",
}

ADAPTERS_COLUMNS = (
    "type",
    "name",
    "kind",
    "source",
    "tensors in a layer",
    "works on",
    "settings",
    "remarks",
)
REFUSED_COLUMNS = ("type", "name", "source", "it is refused because")
ADAPTERS_HEAD = """\
# Adapter types

`adapter.type` chooses what is trained; the default is `lora`. The {usable} types of the first table
can be used with every method; {refused} more of peft's are refused, for the reason given.

```
droppeft run adapter.type=ia3
droppeft run adapter.type=bottleneck adapter.width=32
droppeft run adapter.type=oft adapter.options.oft_block_size=16
```

- *layered*: every trained tensor sits in one layer. A step that drops the layer leaves them as they
  are, bit for bit: no gradient, no momentum, no decay. A layer may have no adapter at all.
- *sliced*: the type has one tensor for all layers; here it is one parameter per layer, with the
  same promise, and one tensor again in the exported folder.
- *global*: the trained tensors belong to no layer (group `other`): nothing to drop or to share by
  layer, everything else is the same.

What "works" means is written as code in `tests/adapter_contract.py` and run on tiny models: only
adapter and head are trained; the seed alone decides their first values; a dropped layer is left
alone; training the adapter lowers the loss; the exported folder, loaded into a plain model, answers
with the same bits; taking the adapter off gives the old backbone back. It says nothing about
accuracy. Tensors are counted in a layer of BERT with default targets, or in the whole prompt.

Settings: `rank`, `alpha`, `dropout`, `width` and `tokens` of the table `[adapter]`, where the type
has them; another one is refused, not ignored. What is not given has peft's own default, except for
`lora` (rank 8, alpha 16), `bottleneck` (width 64) and prompts (20 tokens). Ranks may differ by
layer for `lora`, `loha`, `lokr` and `delora`, widths for `bottleneck`. All else that peft's
configuration class of a type has is an option: `adapter.options.NAME=value`, or a table
`[adapter.options]`. An unknown option is refused with a list of those that exist; so is one that
would train or change more than single layers.

Every type but one is exported in peft's format, for `PeftModel.from_pretrained`. The bottleneck is
ours, since peft has none, and **peft cannot read it**; droppeft's own function does, on a plain
transformers model:

```python
from droppeft.adapters.bottleneck import load_bottleneck

model = load_bottleneck(model, "adapter").eval()
```
"""

ADAPTERS_REFUSED = """\
## Refused types

A version of peft with types that are not in these tables fails our tests, until somebody has looked
at them.
"""


ARCHITECTURES_COLUMNS = (
    "model type",
    "class",
    "blocks",
    "a dropped block returns",
    "reference",
    "classification in `droppeft run`",
    "remarks",
)
ARCHITECTURES_ANSWERS = {
    "tensor": "its input",
    "tuple": "its input, in a tuple",
    "position bias": "its input and position biases",
}
ARCHITECTURES_HEAD = """\
# Architectures

Layer dropout works on the {types} model types of the first table; {refused} more are refused, for
the reason given, and so is every type that is in neither table. A model type is what
`config.model_type` says.

What "works" means is written as code in `tests/architecture_contract.py` and run on tiny models in
fp32 on a CPU, for every way to drop some of three layers (for six ways where there are two stacks):

- The output and all gradients are, bit for bit, those of a **reference** that knows no gates. A
  dropped layer's parameters have no gradient at all.
  - *sliced*: a fresh model of the configuration without those layers, lists with an entry per layer
    sliced too, with copied weights.
  - *moved biases*: the same, but the table of position biases stays with its stack: it lies in the
    first block, whichever that is.
  - *replaced*: a fresh model of the whole configuration in which modules that do nothing stand in
    the place of dropped layers. Used where a layer's place has a meaning, so that slicing would
    change what the others compute; the remark says which.
- With all gates open it is the plain model: output, gradients, names, `state_dict`, random numbers.
- A dropped layer does not run, not even once; outside of `gated` every layer runs.
- With gradient checkpointing (non-reentrant) output and gradients are the same bits, even if the
  gates change between forward and backward.
- Hidden states asked for by depth have an entry per layer, a dropped one's being its input.
- Generation with open gates is the plain model's. With closed ones and a key-value cache it is
  refused at the second token, since a dropped layer adds nothing to the cache; with
  `use_cache=False` it is the reference's.
- A classifier is made as in `droppeft run`, from a saved base model; its adapters get gradients
  layer by layer, and the longest text it says it takes runs. *yes*: with default settings; *name
  targets*: peft knows no default modules, so `adapter.targets` must name them; *with a trained
  head*: the saved model must have a fitting head; *two stacks*: `droppeft run` takes models with
  one; *–*: transformers has no such class.

A list of blocks is named by its place in the class of the second column; in a model for a task it
lies below that. Encoder-decoders have two, of which `find_stacks` gives both.

Made with transformers {transformers}.
"""

ARCHITECTURES_REFUSED = """\
## Refused types
"""

ARCHITECTURES_TAIL = """\
## Another type

Add a line to `ARCHITECTURES` in `src/droppeft/layer_dropout/architectures.py` and a case to
`tests/architecture_contract.py`, run `python tests/architecture_contract.py` and
`python docs/generate.py`. What has to be true: hidden states are the first argument and the first
result of a block, and whatever else later blocks need of it, a dropped one still yields. Blocks of
your own can be given to `gated` without any of this, on your word that it is so.
"""


def main(words: list[str]) -> int:
    """Run the command line; return the exit code."""
    if words not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    if not words:
        write_pages(FOLDER)
        return 0
    stale = stale_pages(FOLDER)
    for name in stale:
        print(f"docs/{name} is stale; run: python docs/generate.py", file=sys.stderr)
    return 1 if stale else 0


def write_pages(folder: Path) -> None:
    """Write every generated page into ``folder``."""
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


def stale_pages(folder: Path) -> list[str]:
    """Name the pages in ``folder`` that are missing or differ from what would be written."""
    return [
        name
        for name, page in PAGES.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != page()
    ]


def configuration_page() -> str:
    """Every setting with its type, default and meaning, one table per section."""
    sections = [CONFIGURATION_HEAD, _section("The run", "", Config)]
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append(_section(f"`[{name}]`", f"{name}.", field.annotation))
    return f"{NOTICE}\n\n" + "\n".join(sections)


def results_page() -> str:
    """What the committed result files say."""
    return f"{NOTICE}\n\n{RESULTS_HEAD}\n{_first_slice()}\n{_head_learning_rate()}\n{_flower()}"


def adapters_page() -> str:
    """Every adapter type, with what its contract found on tiny models."""
    from droppeft.adapters.types import TYPES

    found = json.loads(ADAPTERS.read_text(encoding="utf-8"))
    usable = [
        (
            f"`{name}`",
            kind.title,
            kind.kind,
            _paper(kind.source),
            *_found(found[name]),
            ", ".join(f"`{setting}`" for setting in kind.settings) or "–",
            kind.note,
        )
        for name, kind in TYPES.items()
        if kind.kind != "refused"
    ]
    refused = [
        (f"`{name}`", kind.title, _paper(kind.source), kind.note)
        for name, kind in TYPES.items()
        if kind.kind == "refused"
    ]
    head = ADAPTERS_HEAD.format(usable=len(usable), refused=len(refused))
    tables = _markdown_table(ADAPTERS_COLUMNS, usable), _markdown_table(REFUSED_COLUMNS, refused)
    return f"{NOTICE}\n\n{head}\n{tables[0]}\n{ADAPTERS_REFUSED}\n{tables[1]}"


def architectures_page() -> str:
    """Every model type, with what its contract found on tiny models."""
    from droppeft.layer_dropout import REFUSED

    found = json.loads(ARCHITECTURES.read_text(encoding="utf-8"))
    cases = found["cases"]
    rows = [
        (
            f"`{case['model_type']}`" + (f", {case['variant']}" if case["variant"] else ""),
            case["class"],
            ", ".join(f"`{name}`" for name in case["blocks"]),
            ARCHITECTURES_ANSWERS[case["answer"]],
            case["reference"],
            case["classification"],
            case["note"],
        )
        for case in cases
    ]
    refused = [(f"`{name}`", reason) for name, reason in REFUSED.items()]
    head = ARCHITECTURES_HEAD.format(
        types=len({case["model_type"] for case in cases}),
        refused=len(refused),
        transformers=found["transformers"],
    )
    tables = (
        _markdown_table(ARCHITECTURES_COLUMNS, rows),
        _markdown_table(("model type", "it is refused because"), refused),
    )
    return (
        f"{NOTICE}\n\n{head}\n{tables[0]}\n{ARCHITECTURES_REFUSED}\n{tables[1]}\n"
        f"{ARCHITECTURES_TAIL}"
    )


def _found(families: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """How many tensors a layer of BERT has, and on which architectures the contract is kept."""
    kept = [family for family, outcome in families.items() if "tensors" in outcome]
    return str(families["bert"]["tensors"]), ", ".join(kept)


def _paper(source: str) -> str:
    kind, _, number = source.partition(":")
    start = PAPERS.get(kind)
    return f"[{source}]({start}{number})" if start else source


def _first_slice() -> str:
    content = json.loads((RESULTS / "first_slice.json").read_text(encoding="utf-8"))
    members = {name: member["result"] for name, member in content["members"].items()}
    one = next(iter(members.values()))
    config, target = one["config"], f"{one['target']:.2f}".removeprefix("0")
    lines: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        (f"accuracy, all {one['test_rows']:,} test texts", lambda r: f"{r['global_accuracy']:.3f}"),
        ("TF-IDF + linear SVM, all data in one place", lambda r: f"{r['tfidf_accuracy']:.3f}"),
        (f"first round at the target {target}", lambda r: str(r["target_round"])),
        ("… after, this process (measured)", lambda r: _seconds(r["time_to_target_host_s"])),
        ("… after, side by side (measured)", lambda r: _seconds(r["time_to_target_measured_s"])),
        ("training steps, all rounds (measured)", lambda r: _seconds(r["train_wall_s"])),
        (f"mean active layers of {one['num_layers']}", lambda r: f"{r['mean_active_layers']:.2f}"),
        ("peak activations (measured)", lambda r: f"{r['activation_bytes_peak'] / 1e6:.0f} MB"),
        ("upload, all devices and rounds", lambda r: f"{r['upload_bytes'] / 1e6:.1f} MB"),
    )
    rows = [[title, *(show(result) for result in members.values())] for title, show in lines]
    shares = [f"{member['overhead']:.1%}" for member in content["members"].values()]
    rows.append(["wall time outside training steps and evaluation", *shares])
    head = FIRST_SLICE_HEAD.format(
        layers=one["num_layers"],
        cohort=config["cohort"],
        devices=config["devices"],
        rounds=config["rounds"],
        steps=config["training"]["local_steps"],
        alpha=config["partition"]["alpha"],
        place=_place(one["machine"]),
    )
    return head + "\n" + _markdown_table(("", *members), rows)


def _head_learning_rate() -> str:
    content = json.loads((RESULTS / "head_learning_rate.json").read_text(encoding="utf-8"))
    steps = [str(cell["steps"]) for cell in next(iter(content["summary"].values()))]
    rows = [
        [name, *(f"{cell['mean']:.3f} ± {cell['sd']:.3f}" for cell in cells)]
        for name, cells in content["summary"].items()
    ]
    head = HEAD_RATE_HEAD.format(seeds=len(content["seeds"]), place=_place(content["machine"]))
    return head + "\n" + _markdown_table(("accuracy after … steps of 16 texts", *steps), rows)


def _flower() -> str:
    content = json.loads((RESULTS / "flower_cost.json").read_text(encoding="utf-8"))
    settings = {
        name: dict(word.split("=") for word in words) for name, words in content["settings"].items()
    }
    places = [
        [
            name,
            f"`{place['adapter_folder_sha256'][:16]}`",
            f"{place['rounds_wall_s']:.0f} s",
            f"{place['command_wall_s']:.0f} s",
            *(_bytes(place[key]) for key in TRAFFIC),
        ]
        for name, place in content["places"].items()
    ]
    costs = [
        [
            name,
            f"{cost['client_round_s']:.2f} s ({low:.2f}–{high:.2f})",
            f"{cost['turn_s']:.2f} s",
            f"{cost['beside_turn_s']:.2f} s",
            f"{cost['first_s']:.1f} s",
        ]
        for name, cost in content["client_round"].items()
        for low, high in [cost["client_round_quartiles_s"]]
    ]
    runs = next(iter(content["places"].values()))["runs"]
    head = FLOWER_HEAD.format(
        nodes=settings["places"]["devices"],
        rounds=settings["places"]["rounds"],
        runs=runs,
        place=_place(content["machine"]),
    )
    costs_head = FLOWER_COST_HEAD.format(rounds=settings["client_round"]["rounds"], runs=runs)
    places_columns = ("", "adapter", "rounds", "command", *TRAFFIC.values())
    costs_columns = ("", "client-round (quartiles)", "turn", "beside the turn", "first round")
    return "\n".join(
        [
            head,
            _markdown_table(places_columns, places),
            costs_head,
            _markdown_table(costs_columns, costs),
        ]
    )


def _bytes(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


TRAFFIC = {
    "upload_bytes": "bytes up",
    "download_bytes": "bytes down",
    "upload_framed_bytes": "framed up",
    "download_framed_bytes": "framed down",
}


def _place(machine: dict[str, Any]) -> str:
    return f"{machine['cores']} cores ({machine['processor']}), {machine['threads']} threads"


def _seconds(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0f} s"


def _section(title: str, prefix: str, table: type[BaseModel]) -> str:
    keys = [(key, field) for key, field in known_keys() if key.rpartition(".")[0] == prefix[:-1]]
    rows = ([f"`{key}`", _type(field), _default(key), field.description] for key, field in keys)
    return f"## {title}\n\n{table.__doc__}\n\n" + _markdown_table(
        ("key", "type", "default", "meaning"), rows
    )


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {_number(getattr(bound, name))}"
        for bound in field.metadata
        for kind, (sign, name) in BOUNDS.items()
        if isinstance(bound, kind)
    ]
    return " ".join([_kind(field.annotation), ", ".join(bounds)]).strip()


def _kind(annotation: object) -> str:
    """Name a type for readers; that a setting may be absent shows in its default."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(kind) for kind in arguments if kind is not type(None))
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}s"
    if origin is dict:
        return "table"
    return TYPE_NAMES[annotation]


def _default(key: str) -> str:
    value: object = Config()
    for name in key.split("."):
        value = getattr(value, name)
    if value is None:
        return "–"
    return f"`{_number(value) if isinstance(value, float) else _plain(value)}`"


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _number(value: float) -> str:
    """Four digits, or a power of two where a bound is one."""
    if isinstance(value, int) and value > 10**6 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:.4g}"


PAGES: dict[str, Callable[[], str]] = {
    "adapters.md": adapters_page,
    "architectures.md": architectures_page,
    "configuration.md": configuration_page,
    "results.md": results_page,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
