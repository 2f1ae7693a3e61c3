"""Tables of the reference that follow from the code, such as settings and methods."""

import inspect
import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from benchmarks.pages.markdown import markdown_table
from benchmarks.study import read_values
from droppeft.adapters.types import TYPES
from droppeft.cli import app
from droppeft.client.node_file import NodeFile
from droppeft.config import Bandwidth, Config, flat
from droppeft.config.defaults import (
    BUILTIN_DEFAULTS,
    DEFAULTS_OF_METHOD_AND_TASK,
    METHOD_DEFAULTS,
    TASK_DEFAULTS,
)
from droppeft.config.describing import Setting, all_settings, plain, settings_of
from droppeft.costs.device_profiles import PROFILES
from droppeft.costs.modelled_clock import compute_seconds
from droppeft.layer_dropout import REFUSED
from droppeft.methods import METHODS

DOCS = Path(__file__).resolve().parents[2] / "docs"
ADAPTERS = DOCS / "adapters.json"
ARCHITECTURES = DOCS / "architectures.json"
ODD_INPUTS = DOCS / "odd_inputs.json"
HOSTILE_SERVER = DOCS / "hostile_server.json"
"""What the contracts in `tests/` found."""

PAPERS = {
    "arXiv": "https://arxiv.org/abs/",
    "openreview": "https://openreview.net/forum?id=",
    "doi": "https://doi.org/",
}

METHOD = """\
## {name}

::: droppeft.methods.{module}
    options:
      members: false
      show_root_heading: false
      show_root_toc_entry: false
"""

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


def settings() -> str:
    """Every setting with its type, default and meaning, one table per section."""
    sections = [_section("The run", "", Config)]
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append(_section(f"`[{name}]`", f"{name}.", field.annotation))
    return "\n".join(sections)


def node_file() -> str:
    """Every key of a node file with its type, default and meaning."""
    return _settings_table(one for one in settings_of(NodeFile) if one.key != "source.classes")


def adapter_types() -> str:
    """The adapter types that can be used, with what their contract found on tiny models."""
    found = json.loads(ADAPTERS.read_text(encoding="utf-8"))
    rows = [
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
    return markdown_table(ADAPTERS_COLUMNS, rows)


def refused_adapter_types() -> str:
    """The types of peft that are refused, with the reason."""
    rows = [
        (f"`{name}`", kind.title, _paper(kind.source), kind.note)
        for name, kind in TYPES.items()
        if kind.kind == "refused"
    ]
    return markdown_table(REFUSED_COLUMNS, rows)


def architectures() -> str:
    """The model types that work, with what their contract found on tiny models."""
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
        for case in json.loads(ARCHITECTURES.read_text(encoding="utf-8"))["cases"]
    ]
    return markdown_table(ARCHITECTURES_COLUMNS, rows)


def refused_architectures() -> str:
    """The model types that are refused, with the reason."""
    rows = [(f"`{name}`", reason) for name, reason in REFUSED.items()]
    return markdown_table(("model type", "it is refused because"), rows)


def odd_inputs() -> str:
    """Odd data files, and what happens when they are read."""
    cases = json.loads(ODD_INPUTS.read_text(encoding="utf-8"))
    rows = [(case["group"], case["input"], _shown(case["result"])) for case in cases]
    return markdown_table(("about", "input", "what happens"), rows)


def hostile_server() -> str:
    """What a hostile server can ask a site for, and what happens."""
    cases = json.loads(HOSTILE_SERVER.read_text(encoding="utf-8"))
    rows = [(case["group"], case["asks"], case["result"]) for case in cases]
    return markdown_table(("about", "a server asks for", "what happens"), rows)


def _shown(result: str) -> str:
    """A result; what all files have is left out."""
    usual = "40 rows, classes neg, pos"
    if result.startswith("refused: "):
        return result
    return "read" if result == usual else f"read: {result.removeprefix(f'{usual}; ')}"


def device_profiles() -> str:
    """The device profiles with their sources."""
    rows = [
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
    return markdown_table(DEVICES_COLUMNS, rows)


def command_line() -> str:
    """The help of all commands."""
    command = get_command(app)
    written = get_docs_for_click(obj=command, ctx=Context(command), name="droppeft", title="")
    return written.partition("\n")[2]


def methods() -> str:
    """All methods, with the optional tables of settings that they use."""
    rows = [
        (f"`{name}`", method.summary, ", ".join(f"`{table}`" for table in sorted(method.tables)))
        for name, method in METHODS.items()
    ]
    return markdown_table(("method", "what it does", "tables"), rows)


def method_descriptions() -> str:
    """For each method, the place of its module's docstring, which the site's builder fills in."""
    modules = {
        name: name if find_spec(f"droppeft.methods.{name}") else "other_types" for name in METHODS
    }
    return "\n".join(
        METHOD.format(
            name=", ".join(name for name, own in modules.items() if own == module), module=module
        )
        for module in dict.fromkeys(modules.values())
    )


def calibration() -> str:
    """Step times that a test bed reported, and those of the fitted profiles."""
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
    shown = _settings_table(
        one for one in all_settings() if one.key.rpartition(".")[0] == prefix[:-1]
    )
    return f"## {title}\n\n{inspect.cleandoc(table.__doc__ or '')}\n\n{shown}"


def _settings_table(settings: Iterable[Setting]) -> str:
    rows = (
        [f"`{one.key}`", one.type, f"`{one.default}`" if one.default else "–", one.meaning]
        for one in settings
    )
    shown = markdown_table(("key", "type", "default", "meaning"), rows)
    return f'<div class="settings" markdown>\n\n{shown}\n</div>\n'


def defaults_of_methods() -> str:
    both = {
        f"{method} task={task}": tables
        for (method, task), tables in DEFAULTS_OF_METHOD_AND_TASK.items()
    }
    return _defaults("method", {**METHOD_DEFAULTS, **both})


def defaults_of_tasks() -> str:
    builtin = {f"{name} data=builtin": tables for name, tables in BUILTIN_DEFAULTS.items()}
    found = {name: tables for name, tables in TASK_DEFAULTS.items() if tables}
    return _defaults("task", found | builtin)


def _defaults(kind: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = (
        [
            f"`{name}`",
            ", ".join(f"`{key}={plain(value)}`" for key, value in flat(tables).items()),
        ]
        for name, tables in found.items()
    )
    return markdown_table((kind, "settings"), rows)
