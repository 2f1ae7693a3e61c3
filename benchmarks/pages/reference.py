"""Pages that follow from the code: settings, adapter types, architectures, device profiles.

A page is a function without arguments and a line in `PAGES`, which says where it is written.
"""

import inspect
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from benchmarks.pages.markdown import markdown_table
from benchmarks.study import read_values
from droppeft.config import Bandwidth, Config, build_config, flat, known_keys
from droppeft.config.schema import METHOD_DEFAULTS

DOCS = Path(__file__).resolve().parents[2] / "docs"
ADAPTERS = DOCS / "adapters.json"
ARCHITECTURES = DOCS / "architectures.json"
"""What the contracts in `tests/` found."""

NOTICE = "<!-- Written by benchmarks/pages/reference.py: change the source, not this page. -->"
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

A run is described by a TOML file, by overrides `key=value` on the command line, or by both. An
override wins over the file.

```
droppeft run my.toml rounds=50 dropout.mean=0.5
```

```toml
method = "droppeft"
rounds = 50

[dropout]
mean = 0.5
```

- A key inside a table is written with a dot on the command line.
- A list is written `[0.0, 0.5, 0.5]` in both places; a list of texts may also be written `a,b` on
  the command line.
- An unknown key is an error that names the nearest one, so a typing mistake never passes for a
  default.
- Of settings that stand "instead of" another only one may be given; an override on the command line
  replaces the file's choice.
- Some methods have other defaults than the tables below; they hold where nothing is given
  ([defaults of methods](#defaults-of-methods)).
- Every run writes all values, defaults included, to `config.toml` in its result folder; that file
  repeats the run.

In the tables "–" as a default means that nothing is set.
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
    "8-bit",
    "4-bit",
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
  same property, and one tensor again in the exported folder.
- *global*: the trained tensors belong to no layer (group `other`): nothing to drop or to share by
  layer, everything else is the same.

`tests/adapter_contract.py` defines what "works" means and tests it on tiny models: only adapter and
head are trained; the seed alone decides their initial values; a dropped layer is not changed;
training the adapter lowers the loss; the exported folder, loaded into a plain model, gives the same
output bit for bit; removing the adapter restores the backbone. It says nothing about
accuracy. Tensors are counted in a layer of BERT with default targets, or in the whole prompt.

The columns "8-bit" and "4-bit" say the same of a backbone with `quantization=8bit` or `4bit`, and
that all outputs and gradients are, up to rounding, those of the dequantised weights. *yes*: on the
same architectures. (GPT-2's Conv1D maps, which some types do not support, become linear maps when
they are quantised.) Where there is a –, `droppeft run` refuses before training: most of these types
need a weight that is a matrix of numbers. LoRA's `use_dora` is refused with 8 bits.

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

The tests fail with a version of peft that has types which are not in these tables, until they have
been added.
"""


ARCHITECTURES_COLUMNS = (
    "model type",
    "class",
    "blocks",
    "a dropped block returns",
    "reference",
    "checkpointing",
    "classification in `droppeft run`",
    "remarks",
)
ARCHITECTURES_OUTPUTS = {
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
- With transformers' gradient checkpointing output and gradients are those without, even if the
  gates change between forward and backward, when the whole model is trained and when parameters in
  the blocks alone are (as with adapters, after `enable_input_require_grads()`). The bits are the
  same, except for reentrant checkpointing of two stacks, where gradients are added in another
  order: within 1e-5 of the largest. *both*: reentrant and non-reentrant; *non-reentrant; both for
  adapters*: reentrant fails when the whole model is trained, with or without gates; *–*:
  transformers has none.
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
`tests/architecture_contract.py`, run `python tests/architecture_contract.py` and `python -m
benchmarks.pages.generate`. What has to be true: hidden states are the first argument and the first
result of a block, and whatever else later blocks need of it, a dropped one still yields. You can
give blocks of your own to `gated` without any of this, if they meet these conditions.
"""


DEVICES_COLUMNS = (
    "profile",
    "peak",
    "effective",
    "per step",
    "memory",
    "idle, training",
    "download",
    "upload",
    "availability",
    "source",
)
CALIBRATION_COLUMNS = (
    "profile",
    "data",
    "tokens",
    "FLOPs of a step",
    "anchor",
    "modelled",
    "error",
)
DEVICES_HEAD = """\
# Device profiles

A run simulates clients on hardware that is not here. What a local training takes on such a device
is *modelled* from what the client reports: which layers ran, for how many tokens. Every number of
that kind has `modelled` in its name, and is shown beside what was measured on this machine.

```
droppeft run                                                # three Jetsons, a third each
droppeft run clock.profiles=phone,laptop_cpu
droppeft run clock.over_selection=1.3 clock.deadline_s=60   # draw more, merge the first
```

A client's time on the modelled clock is download + training + measuring the reward (if requested) +
upload:

- **Compute**: FLOPs over effective FLOP/s, and a fixed overhead per optimizer step. The FLOPs of
  every layer and of the rest are counted by running the model itself without values, at three
  lengths; a layer counts for the tokens that it computed, padding included.
- **Transfer**: bytes of the tensors over bandwidth, which may be drawn anew for each client and
  round (a normal draw, cut off at both ends).
- **Energy**: full watts while it computes, idle watts while it loads and sends. Waiting for
  others is not counted.

A round lasts until the slowest merged client has replied. `clock.over_selection` draws more
clients than the cohort: the first `cohort_size` of them by modelled time are merged, the others are
*surplus*. `clock.deadline_s` sets aside who takes longer (*late*); a round that closes with fewer
than its cohort because somebody was late lasts until the deadline. A client may be *absent*, by
the availability of its profile: it is drawn, but nothing is sent to it and the round does not wait
for it. Late and surplus clients have trained: their energy, bytes and rows are in the ledger.

A model whose arithmetic depends on values (of those that classify, `xmod`) cannot be counted: it is
trained without a modelled clock, and a deadline or over-selection is refused.

All of this follows from the seed, the instructions and the updates. It does not depend on the
transport, the order of arrival or this machine's speed, and is the same in a resumed run.

## Profiles
"""

DEVICES_OWN = """\
Where a profile rests on an assumption, its source says so: such numbers describe a class of
devices, not a product. A profile of your own, or one in place of a known one, is a table of the
run's TOML file:

```toml
[clock]
profiles = ["watch", "jetson_tx2"]

[clock.custom.watch]
effective_flops_per_s = 1e10
memory_bytes = 5e8
idle_watts = 0.1
train_watts = 1.0
download = 1e6
upload = {mean = 1e5, deviation = 5e4, least = 1e4, most = 1e6}  # bytes per second
step_overhead_s = 0.1                                            # 0 if not given, as above
availability = 0.5                                               # 1 if not given
```
"""

CALIBRATION_HEAD = """\
## Calibration

`benchmarks/clock_calibration` fits the effective speed of the three Jetsons to step times that
an earlier test bed reported for {model} with LoRA in {layers} layers. **Batch and length were not
stated: batch {batch} and the lengths of this table are our assumption**, and the speed depends on
it. The fit minimises squared relative errors. The overhead may not be negative and comes out as 0,
because from the shortest to the middle length the anchors grow faster than the arithmetic.
"""

CALIBRATION_TAIL = """\
The clock does not model memory bandwidth (a small batch is slower than it says), throttling, and
the kernels that a device has. The quadratic part of attention is charged at the mean length of a
local training's rows: the charge is low by that part times the squared relative spread of the
lengths. For {model} at {length} tokens the part is {quadratic} of a step, so rows that spread by
half their mean are charged {error} too little. A dropped layer saves its FLOPs, but none of the
overhead per step.
"""


def configuration_page() -> str:
    """Every setting with its type, default and meaning, one table per section."""
    sections = [CONFIGURATION_HEAD, _section("The run", "", Config)]
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append(_section(f"`[{name}]`", f"{name}.", field.annotation))
    sections.append(_defaults_of_methods())
    return f"{NOTICE}\n\n" + "\n".join(sections)


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
            *_found(found["none"][name]),
            _also_on(found["8bit"].get(name, {}), found["none"][name]),
            _also_on(found["4bit"].get(name, {}), found["none"][name]),
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
    tables = markdown_table(ADAPTERS_COLUMNS, usable), markdown_table(REFUSED_COLUMNS, refused)
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
            ARCHITECTURES_OUTPUTS[case["output"]],
            case["reference"],
            case["checkpointing"],
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
        markdown_table(ARCHITECTURES_COLUMNS, rows),
        markdown_table(("model type", "it is refused because"), refused),
    )
    return (
        f"{NOTICE}\n\n{head}\n{tables[0]}\n{ARCHITECTURES_REFUSED}\n{tables[1]}\n"
        f"{ARCHITECTURES_TAIL}"
    )


def devices_page() -> str:
    """The profiles, and how well those that were fitted give the anchors."""
    from droppeft.costs.device_profiles import PROFILES

    profiles = [
        (
            f"`{name}`",
            _with_unit(profile.peak_flops_per_s or 0, "FLOP/s"),
            _with_unit(profile.effective_flops_per_s, "FLOP/s"),
            f"{1000 * profile.step_overhead_s:g} ms",
            f"{profile.memory_bytes / 2**30:g} GiB",
            f"{profile.idle_watts:g} W, {profile.train_watts:g} W",
            _link(profile.download),
            _link(profile.upload),
            f"{profile.availability:g}",
            profile.source,
        )
        for name, profile in PROFILES.items()
    ]
    parts = (DEVICES_HEAD, markdown_table(DEVICES_COLUMNS, profiles), DEVICES_OWN, _calibration())
    return f"{NOTICE}\n\n" + "\n".join(parts)


def _calibration() -> str:
    content = read_values("clock_calibration")
    head = CALIBRATION_HEAD.format(**content)
    tail = CALIBRATION_TAIL.format(
        model=content["model"],
        length=content["steps"]["MNLI"]["length"],
        quadratic=f"{100 * content['quadratic_share']:.1f} %",
        error=f"{100 * content['quadratic_share'] / 4:.1f} %",
    )
    return f"{head}\n{calibration()}\n{tail}"


def calibration() -> str:
    """Step times that a test bed reported, and those of the fitted profiles."""
    from droppeft.costs.device_profiles import PROFILES
    from droppeft.costs.modelled_clock import compute_seconds

    content = read_values("clock_calibration")
    rows = []
    for name, anchors in content["anchors_s"].items():
        for data, anchor in anchors.items():
            work = content["steps"][data]
            modelled = compute_seconds(PROFILES[name], work["flops"], steps=1)
            rows.append(
                (
                    f"`{name}`",
                    data,
                    str(work["length"]),
                    _with_unit(work["flops"], "FLOP"),
                    f"{anchor:.2f} s",
                    f"{modelled:.2f} s",
                    f"{100 * (modelled / anchor - 1):+.0f} %",
                )
            )
    return markdown_table(CALIBRATION_COLUMNS, rows)


def _link(link: Bandwidth) -> str:
    if not link.deviation:
        return f"{link.mean / 1e6:g} MB/s"
    spread = f"{link.mean / 1e6:g} ± {link.deviation / 1e6:g}"
    return f"{spread}, within {(link.least or 0) / 1e6:g}–{(link.most or 0) / 1e6:g} MB/s"


def _with_unit(value: float, unit: str) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _found(families: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """How many tensors a layer of BERT has, and on which architectures the contract holds."""
    return str(families["bert"]["tensors"]), ", ".join(_kept(families))


def _also_on(families: dict[str, dict[str, Any]], whole: dict[str, dict[str, Any]]) -> str:
    """On which architectures the contract holds when they are quantised."""
    missing = [family for family in _kept(whole) if family not in _kept(families)]
    more = [family for family in _kept(families) if family not in _kept(whole)]
    if missing:
        return ", ".join(_kept(families)) or "–"
    return ", ".join(["yes", *(f"{family} too" for family in more)])


def _kept(families: dict[str, dict[str, Any]]) -> list[str]:
    return [family for family, outcome in families.items() if "tensors" in outcome]


def _paper(source: str) -> str:
    kind, _, number = source.partition(":")
    start = PAPERS.get(kind)
    return f"[{source}]({start}{number})" if start else source


def _section(title: str, prefix: str, table: type[BaseModel]) -> str:
    keys = [(key, field) for key, field in known_keys() if key.rpartition(".")[0] == prefix[:-1]]
    rows = ([f"`{key}`", _type(field), _default(key), field.description] for key, field in keys)
    return f"## {title}\n\n{inspect.cleandoc(table.__doc__ or '')}\n\n" + markdown_table(
        ("key", "type", "default", "meaning"), rows
    )


def _defaults_of_methods() -> str:
    rows = (
        [
            f"`{method}`",
            ", ".join(f"`{key}={_plain(value)}`" for key, value in flat(tables).items()),
        ]
        for method, tables in METHOD_DEFAULTS.items()
    )
    return "## Defaults of methods\n\n" + markdown_table(("method", "settings"), rows)


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
    """The default of a method that has no defaults of its own."""
    value: object = Config() if key == "method" else build_config({"method": "droppeft"})
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
    "docs/adapters.md": adapters_page,
    "docs/architectures.md": architectures_page,
    "docs/configuration.md": configuration_page,
    "docs/device_profiles.md": devices_page,
}
"""Where each page is written, from the root of the repository."""
