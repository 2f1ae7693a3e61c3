"""Write the pages of this folder that are derived from the code.

``python docs/generate.py`` writes them; with ``--check`` it writes nothing and exits with 1 when
one of them is stale. A new page is a function without arguments and a line in ``PAGES``.
"""

import inspect
import json
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import annotated_types
from convergence_page import convergence_page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from readme_table import readme_page
from reference_pages import command_line_page, methods_page
from results_page import results_page
from sharing_page import sharing_page
from tables import NOTICE, markdown_table, read_values

from droppeft.config import Bandwidth, Config, flat, known_keys
from droppeft.config.schema import METHOD_DEFAULTS

FOLDER = Path(__file__).parent
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
# Settings

This page lists every setting of a run with its type, default and meaning. A run is described by
settings on the command line, by a TOML file, or by both. The command line wins over the file.

```
droppeft run my.toml rounds=50 dropout.mean=0.5
```

```toml
rounds = 50

[dropout]
mean = 0.5
```

- On the command line a key inside a table is written with a dot.
- A list is written `[0.0, 0.5, 0.5]` in both places. On the command line a list of texts may also
  be written `a,b`.
- An unknown key is an error, and the message names the most similar key.
- If a setting says "instead of" another one, only one of the two may be given. On the command line
  it replaces the choice of the file.
- A setting that would have no effect is an error.
- Some methods have defaults of their own ([defaults of methods](#defaults-of-methods)). They apply
  to settings that are not given.
- Every run writes all settings, defaults included, to `config.toml` in its folder. `droppeft run`
  on that file repeats the run.

A default of "–" means that the setting has no value.
"""


ADAPTERS = FOLDER / "adapters.json"
ARCHITECTURES = FOLDER / "architectures.json"

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

This page lists the types of adapters that can be trained, and on which models they work. The
setting is `adapter.type`, and the default is `lora`. The {usable} types of the first table work
with every method that does not need a certain type. {refused} more types of peft are refused, with
the reason in the [second table](#refused-types).

```
droppeft run adapter.type=ia3
droppeft run adapter.type=bottleneck adapter.width=32
droppeft run adapter.type=oft adapter.options.oft_block_size=16
```

**Kinds.** Layer dropout and layer sharing work layer by layer, so it matters where the trained
tensors are.

- *layered*: every trained tensor belongs to one layer. A step that drops the layer does not change
  it. A layer may also have no adapter.
- *sliced*: peft has one tensor for all layers. droppeft trains one slice per layer, and the
  exported adapter has the single tensor again.
- *global*: the trained tensors belong to no layer, as with prompts. Nothing of the adapter can be
  dropped or personal. Everything else works.

**Settings.** `rank`, `alpha`, `dropout`, `width` and `tokens` of the table `[adapter]` apply to the
types that list them, and are refused for others. Values that are not given are peft's defaults,
except for `lora` (rank 8, alpha 16), `bottleneck` (width 64) and prompts (20 tokens). All other
settings of a peft configuration class are given as `adapter.options.NAME=value`. Options that would
affect more than single layers are refused.

**Works on.** `tests/adapter_contract.py` tests each type on tiny models. Only the adapter and the
head are trained, a dropped layer does not change, training lowers the loss, the exported adapter
gives the same output bit for bit in a plain model, and removing it restores the backbone. The test
says nothing about accuracy. The columns "8-bit" and "4-bit" are for `quantization=8bit` and `4bit`;
"yes" means the same models, and "–" means that the type is refused. LoRA's `use_dora` is refused
with 8 bits.

**Loading.** All types but one are exported in peft's format, for `PeftModel.from_pretrained`. peft
has no bottleneck adapter, so droppeft has a function that loads it into a plain transformers model:

```python
from droppeft.adapters.bottleneck import load_bottleneck

model = load_bottleneck(model, "adapter").eval()
```
"""

ADAPTERS_REFUSED = """\
## Refused types
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

This page says which models of transformers can be trained with layer dropout. It lists {types}
model types that work and {refused} that are refused, with the reason. Types in neither table are
refused too. The model type is `model_type` in a model's `config.json`.

`tests/architecture_contract.py` tests each type on tiny models in fp32 on a CPU, for every way to
drop some of three layers. The table was made with transformers {transformers}. A type is listed if:

- The output and all gradients are bit for bit those of a *reference* model without the dropped
  layers. The parameters of a dropped layer have no gradient.
- With no layer dropped, output, gradients, `state_dict` and random numbers are those of the plain
  model.
- Gradient checkpointing does not change output or gradients.
- `output_hidden_states` still has one entry per layer. The entry of a dropped layer is its input.
- Generation with all layers is that of the plain model. Generation with dropped layers and a
  key-value cache is refused.

**Reference.** *sliced*: a new model without the dropped layers. *moved biases*: the same, but the
table of position biases in the first block is kept. *replaced*: a whole model in which the dropped
layers do nothing, for types whose layers depend on their position.

**Checkpointing.** *both*: reentrant and non-reentrant. *non-reentrant; both for adapters*:
reentrant checkpointing fails when the whole model is trained, with or without droppeft. *–*:
transformers has none for this type.

**Classification in `droppeft run`.** *yes*: works with default settings. *name targets*: peft has
no default modules for the type, so set `adapter.targets`. *with a trained head*: the saved model
must have a classification head. *two stacks*: refused, because the model has an encoder and a
decoder. *–*: transformers has no such class.

Blocks are named by their place in the class of the second column. Encoder-decoders have two lists
of blocks, which `find_stacks` returns.
"""

ARCHITECTURES_REFUSED = """\
## Refused types
"""

ARCHITECTURES_TAIL = """\
## Add a type

Add a line to `ARCHITECTURES` in `src/droppeft/layer_dropout/architectures.py` and a case to
`tests/architecture_contract.py`. Then run `python tests/architecture_contract.py` and `make
results`. The hidden states must be the first argument and the first result of a block, and a
dropped block must still return whatever else later blocks need. If your own blocks meet these
conditions, you can also give them to `gated` directly.
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

This page lists the hardware on which a run can be modelled, with the source of every number. It
also says how to describe hardware of your own. [Clocks](../concepts/clocks.md) explains what the
modelled clock computes from a profile.

```
droppeft run                                     # three Jetsons, a third of the clients each
droppeft run clock.profiles=phone,laptop_cpu
```

## Profiles
"""

DEVICES_OWN = """\
Where a number is an assumption, the source says so. Such a profile describes a class of devices and
not a product.

## A profile of your own

A table of the run's TOML file adds a profile, or replaces one of the table above:

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
step_overhead_s = 0.1                                            # default: 0
availability = 0.5                                               # default: 1
```
"""

CALIBRATION_HEAD = """\
## Calibration

The effective speeds of the three Jetsons were fitted by `benchmarks/clock_calibration` to step
times that were reported for {model} with LoRA in {layers} layers. **The report does not state the
batch size and the lengths. We assume batch {batch} and the lengths of this table**, and the fitted
speed depends on this. The fit minimises squared relative errors and does not allow a negative
overhead per step; the fitted overhead is 0.
"""

CALIBRATION_TAIL = """\
The clock does not model memory bandwidth, throttling, or which kernels a device has. Steps with
small batches take longer on real hardware than the clock says. The quadratic part of attention is
computed for the mean length of a local training's rows, which is too little if lengths vary. For
{model} at {length} tokens this part is {quadratic} of a step; rows whose lengths spread by half
their mean are modelled {error} too fast.
"""


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    if not arguments:
        write_pages(FOLDER)
        return 0
    stale = stale_pages(FOLDER)
    for name in stale:
        print(f"docs/{name} is stale; run: python docs/generate.py", file=sys.stderr)
    return 1 if stale else 0


def write_pages(folder: Path) -> None:
    """Write every generated page into ``folder``."""
    for name, page in PAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
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
    head = CALIBRATION_HEAD.format(**content)
    tail = CALIBRATION_TAIL.format(
        model=content["model"],
        length=content["steps"]["MNLI"]["length"],
        quadratic=f"{100 * content['quadratic_share']:.1f} %",
        error=f"{100 * content['quadratic_share'] / 4:.1f} %",
    )
    return f"{head}\n{markdown_table(CALIBRATION_COLUMNS, rows)}\n{tail}"


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
    shown = markdown_table(("key", "type", "default", "meaning"), rows)
    about = inspect.cleandoc(table.__doc__ or "")
    return f'## {title}\n\n{about}\n\n<div class="settings" markdown>\n\n{shown}\n</div>\n'


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
    "../README.md": readme_page,
    "reference/adapters.md": adapters_page,
    "reference/architectures.md": architectures_page,
    "reference/command_line.md": command_line_page,
    "reference/device_profiles.md": devices_page,
    "reference/layer_criteria.md": sharing_page,
    "reference/methods.md": methods_page,
    "reference/settings.md": configuration_page,
    "convergence.md": convergence_page,
    "results.md": results_page,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
