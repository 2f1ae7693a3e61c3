"""What a run prints when it has finished: a table, the conclusion, and what to type next."""

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from droppeft.config import build_config
from droppeft.config.task_detection import CAUSAL_LM, CLASSIFICATION, detected_task
from droppeft.methods.without_effect import given
from droppeft.quantities import bytes_text, counted, joules_text, seconds_text, share
from droppeft.runs.folder import PAGE
from droppeft.tasks.metrics import F1, LOSS, TEXT_METRICS, Metric, metrics_in, primary_metric

SAMPLE_LENGTH = 240
"""Most characters of a sample's text on the screen."""

COMPARED = (
    *("source.", "partition.", "sites", "training.", "clients", "cohort_size", "rounds"),
    "evaluation.",
)
"""Beginnings of the settings that another method shall have, too, to be comparable."""

NOT_COMPARED = ("training.precision", "evaluation.mistakes")
"""Settings that begin so, but are chosen by the hardware again, or concern one run alone."""

YOUR_OWN = {
    CLASSIFICATION: ("run data=FILE.csv", "text and label"),
    CAUSAL_LM: ("run data=FILE.jsonl", "prompt and completion"),
}
"""For each task, a run on own data and the names of its columns."""

SAMPLE_STYLES = {"prompt": "dim", "reference": "cyan", "before": "yellow", "after": "green"}


def closing(result: Mapping[str, Any], folder: Path | None, *, commands: bool = True) -> Group:
    """The table, the conclusion, where the page is, and the next commands.

    Args:
        result: content of ``result.json``.
        folder: of the run; ``None`` leaves page and commands out.
        commands: whether to say what to type next.
    """
    parts: list[RenderableType] = [table(result), *_samples(result)]
    parts.append(Text("Conclusion", style="bold"))
    rounds = "round" if result["rounds"] == 1 else f"{result['rounds']} rounds"
    time = f"The {rounds} took {seconds_text(result['host_wall_s'])} here."
    parts += [Padding(Text(sentence), (0, 2)) for sentence in (*result["conclusion"], time)]
    if folder is not None and (folder / PAGE).is_file():
        page = Text(str(folder / PAGE), style="cyan", overflow="fold")
        parts += [Text(""), Text("Page", style="bold"), Padding(page, (0, 2))]
    if folder is not None and commands:
        parts += [
            Text(""),
            Text("Next", style="bold"),
            Padding(next_commands(result, folder), (0, 2)),
        ]
    return Group(*parts)


def next_commands(result: Mapping[str, Any], folder: Path) -> Group:
    """Commands about the finished run, and for further runs, each with what it does."""
    program, run = _program(), shlex.quote(str(folder))
    methods = (result["method"], _other(result["method"]))
    commands = {}
    if result["trend"] == "improving":
        more = f"resume {run} rounds={2 * result['rounds']}"
        commands[more] = "More rounds, since it was still improving:"
    if result[primary_metric(result).key("global")] is not None:
        commands[f"export {run} --merge"] = "The model in transformers' format:"
        if result["task"] == CAUSAL_LM:
            commands[f"chat {run}"] = "Talk to the model:"
        elif result["data"] != "builtin":
            commands[f"predict {run} NEW.csv"] = "The class of each row of another file:"
    if _clients_are_here(result["config"]):
        same = " ".join(["compare", *methods, *_model_and_data(result)])
        commands[same] = "Two methods side by side:"
    if result["data"] == "builtin":
        command, columns = YOUR_OWN[result["task"]]
        commands[command] = f"Your own texts, in columns named {columns}:"
    lines: list[RenderableType] = []
    for command, meaning in commands.items():
        lines.append(Text(meaning, style="dim"))
        lines.append(Padding(Text(f"{program} {command}", style="cyan", overflow="fold"), (0, 2)))
    return Group(*lines)


def _clients_are_here(config: Mapping[str, Any]) -> bool:
    """Whether the clients' rows are on this machine."""
    return config["partition"]["kind"] != "sites" or bool(config["sites"])


def _model_and_data(result: Mapping[str, Any]) -> list[str]:
    """The settings that name the run's model, data and columns; none for what is built in."""
    named = {key: result[key] for key in ("model", "data") if result[key] != "builtin"}
    source = result["config"].get("source", {}) if "data" in named else {}
    if result["task"] != detected_task({**named, "source": source}):
        named = {"task": result["task"], **named}
    named |= {
        key: item
        for key, item in given_settings(result)
        if key.startswith(COMPARED) and key not in NOT_COMPARED
    }
    return [shlex.quote(f"{key}={as_word(value)}") for key, value in named.items()]


def as_word(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def given_settings(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings of the run that differ from their defaults."""
    return list(given(build_config(result["config"])).items())


def _program() -> str:
    """How this program can be started again."""
    if shutil.which("droppeft"):
        return "droppeft"
    return "python -m droppeft" if Path(sys.argv[0]).stem == "__main__" else sys.argv[0]


def _other(method: str) -> str:
    return "fedlora" if method != "fedlora" else "adaptive"


def table(result: Mapping[str, Any]) -> Table:
    """The result as a table: quality and its references, then costs."""
    shown = Table(box=box.SIMPLE_HEAD, title="Result", title_justify="left", show_header=False)
    shown.add_column("what", style="bold")
    shown.add_column("value", justify="right")
    shown.add_column("note", style="dim")
    for what, value, note in (*_quality_lines(result), *_cost_lines(result)):
        shown.add_row(what, value, note)
    return shown


def _quality_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    sample = f"on {counted(result['sampled_test_rows'], 'test text')}"
    metric = primary_metric(result)
    lines = [
        *_global_lines(result, metric, sample),
        *_generated_lines(result),
        *_personalised_lines(result, metric),
        ("before training", metric.text(result[metric.key("initial")]), sample),
        *_reference_lines(result),
    ]
    if result["target"] is not None:
        lines += _target_lines(result, metric)
    return lines


def _global_lines(
    result: Mapping[str, Any], metric: Metric, sample: str
) -> list[tuple[str, str, str]]:
    if result[metric.key("global")] is None:
        why = "not finite" if result["test_rows"] else "there is no global model"
        return [(metric.label, "–", why)]
    others = [
        (other.label, other.text(result[other.key("global")]), which_f1(other, result))
        for other in metrics_in(result)
        if other not in (metric, LOSS)
    ]
    best = f"round {result['best_round']}, {sample}"
    delivered, rounds = result["delivered_round"], result["rounds"]
    chosen = "" if delivered == rounds else f", model of round {delivered} of {rounds}"
    return [
        (
            metric.label,
            metric.text(result[metric.key("global")]),
            f"{_all(result)}{counted(result['test_rows'], 'test text')}{chosen}",
        ),
        *others,
        (f"after round {result['first_round']}", metric.text(result[metric.key("first")]), sample),
        ("best", metric.text(result[metric.key("best")]), best),
    ]


def _generated_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Scores of the texts that the model wrote."""
    generated = result.get("generated")
    if generated is None:
        return []
    return [
        (
            metric.label,
            share(generated["after"][name]),
            f"{counted(generated['rows'], 'text')} written by the model; before training "
            f"{share(generated['before'][name])}",
        )
        for name, metric in TEXT_METRICS.items()
        if generated["after"][name] or generated["before"][name]
    ]


def _samples(result: Mapping[str, Any]) -> list[RenderableType]:
    """Samples of what the model wrote before and after training."""
    parts: list[RenderableType] = []
    for number, sample in enumerate(result.get("generated", {}).get("samples", ()), start=1):
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="bold", no_wrap=True)
        rows.add_column(overflow="fold")
        for name in ("prompt", "reference", "before", "after"):
            rows.add_row(name, Text(shortened(sample[name]), style=SAMPLE_STYLES[name]))
        parts += [Text(f"Sample {number}", style="bold"), Padding(rows, (0, 2)), Text("")]
    return parts


def shortened(text: str) -> str:
    """Return a text on one line, without its middle if it is long."""
    line = " ".join(text.split())
    half = SAMPLE_LENGTH // 2
    return line if len(line) <= SAMPLE_LENGTH else f"{line[:half]} … {line[-half:]}"


def _all(result: Mapping[str, Any]) -> str:
    """Return "all " if the last evaluation was on all test rows, or else nothing."""
    limit = result["config"]["evaluation"].get("final_rows")
    return "" if limit == result["test_rows"] else "all "


def _reference_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The references that the task has."""
    if "majority_accuracy" not in result:
        return []
    tfidf = share(result["tfidf_accuracy"])
    return [
        ("majority class", share(result["majority_accuracy"]), "reference"),
        ("TF-IDF + linear SVM", tfidf, "reference, all data in one place"),
    ]


def which_f1(metric: Metric, result: Mapping[str, Any]) -> str:
    """What is particular to a metric: which F1 score it is."""
    if metric != F1:
        return ""
    return "of class 1" if result["classes"] == 2 else "mean over classes (macro)"


def _personalised_lines(result: Mapping[str, Any], metric: Metric) -> list[tuple[str, str, str]]:
    """Quality of clients' own models; no lines if the run did not evaluate them."""
    failed = result["personalised_failures"]
    if result[metric.key("personalised")] is None:
        notes = [f"client {one['client']}: {one['reason']}" for one in failed[:1]]
        return [("personalised", "none", f"no client was evaluated ({note})") for note in notes]
    clients, rows = result["personalised_clients"], result["personalised_rows"]
    whose = "its" if clients == 1 else "their"
    note = f"{_mean_of(clients)} on {whose} own {counted(rows, 'test text')}"
    of_them = f"of them: {counted(max(1, -(-clients // 10)), 'client')}"
    if failed:
        note += f"; {len(failed)} could not be evaluated ({failed[0]['reason']})"
    if lost := result["personalised_lost"]:
        note += f"; {len(lost)} had lost their client state and used the global model"
    lines = [
        ("personalised", metric.text(result[metric.key("personalised")]), note),
        ("worst tenth", metric.text(result["personalised_worst_tenth"]), of_them),
        ("deviation", metric.text(result["personalised_deviation"]), "between them"),
        *_personalised_text_lines(result),
    ]
    if "own_majority_accuracy" in result:
        own = share(result["own_majority_accuracy"])
        note = "reference: always predict the client's most frequent class"
        lines.append(("own majority class", own, note))
    return lines


def _mean_of(clients: int) -> str:
    """Of how many clients' own models a value is the mean."""
    return (
        "the one client's own model" if clients == 1 else f"mean of {clients:,} clients' own models"
    )


def _personalised_text_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Scores of the texts that clients' own models wrote."""
    texts = [one["texts"] for one in result["personalised"] if "texts" in one]
    note = f"{_mean_of(len(texts))}, which wrote {counted(sum(texts), 'text')}"
    values = ((metric, result.get(metric.key("personalised"))) for metric in TEXT_METRICS.values())
    return [
        (f"personalised {metric.label}", share(value), note) for metric, value in values if value
    ]


def _target_lines(result: Mapping[str, Any], metric: Metric) -> list[tuple[str, str, str]]:
    name = f"target {metric.text(result['target'])}"
    if result["target_round"] is None:
        return [(name, "not reached", "")]
    here, modelled = (result[f"time_to_target_{clock}_s"] for clock in ("measured", "modelled"))
    note = f"round {result['target_round']}; as if clients ran in parallel (measured)"
    return [
        (name, seconds_text(here), note),
        ("", seconds_text(modelled), "on their profiles (modelled)"),
    ]


def _cost_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    layers = layers_above_the_frozen(result)
    depth = result["mean_active_layers"]
    above = "" if layers == result["num_layers"] else " above the frozen ones"
    return [
        (
            "time",
            seconds_text(result["host_wall_s"]),
            f"{counted(result['rounds'], 'round')} on this machine (measured)",
        ),
        ("training time", seconds_text(result["train_wall_s"]), "all clients added up"),
        (
            "modelled time",
            seconds_text(result["round_modelled_s"]),
            "as if clients ran in parallel, on their profiles",
        ),
        ("energy", joules_text(result["energy_modelled_j"]), "all clients (modelled)"),
        ("upload", bytes_text(result["upload_bytes"]), "all clients, all rounds"),
        ("download", bytes_text(result["download_bytes"]), "all clients, all rounds"),
        (
            "mean depth",
            "–" if depth is None else f"{depth:.2f}",
            f"of {counted(layers, 'layer')}{above} per step",
        ),
        *_other_modes(result),
        ("activations", bytes_text(result["activation_bytes_peak"]), "peak stored for backward"),
    ]


def _other_modes(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lines about the layers that ran forward only, and that were skipped, if there were any."""
    modes = {
        "forward only": ("mean_forward_layers", "without a backward pass"),
        "skipped": ("mean_skipped_layers", "by layer dropout"),
    }
    return [
        (name, f"{result[key]:.2f}", f"layers per step, {note}")
        for name, (key, note) in modes.items()
        if result[key]
    ]


def layers_above_the_frozen(about: Mapping[str, Any]) -> int:
    """How many layers are not frozen; drop rates and depth are about these."""
    layers: int = about["num_layers"] - about["config"]["frozen"]["layers"]
    return layers
