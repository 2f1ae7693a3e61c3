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

from droppeft.quantities import bytes_text, joules_text, seconds_text, share

LABEL_WIDTH = 10


def closing(result: Mapping[str, Any], folder: Path | None) -> Group:
    """The table, the conclusion and the next commands.

    Args:
        result: content of ``result.json``.
        folder: of the run; ``None`` leaves the commands out.
    """
    parts: list[RenderableType] = [table(result), Text("Conclusion", style="bold")]
    time = f"The {result['rounds']} rounds took {seconds_text(result['host_wall_s'])} here."
    parts += [Padding(Text(sentence), (0, 2)) for sentence in (*result["conclusion"], time)]
    if folder is not None:
        parts += [
            Text(""),
            Text("Next", style="bold"),
            Padding(next_commands(result, folder), (0, 2)),
        ]
    return Group(*parts)


def next_commands(result: Mapping[str, Any], folder: Path) -> Group:
    """Commands about the finished run, and for further runs, each with what it does."""
    program, run = _program(), shlex.quote(str(folder))
    commands = {
        f"report {run}": "Figures and settings of this run, as an HTML page:",
        f"export {run} --merge": "The model in transformers' format:",
        f"compare {result['method']} {_other(result['method'])}": "Two methods side by side:",
        "run data=FILE.csv": "Your own texts, in columns named text and label:",
    }
    if result["global_accuracy"] is None:
        del commands[f"export {run} --merge"]
    lines: list[RenderableType] = []
    for command, meaning in commands.items():
        lines.append(Text(meaning, style="dim"))
        lines.append(Padding(Text(f"{program} {command}", style="cyan", overflow="fold"), (0, 2)))
    return Group(*lines)


def _program() -> str:
    """How this program can be started again: its name if it is on the path."""
    return "droppeft" if shutil.which("droppeft") else sys.argv[0]


def _other(method: str) -> str:
    return "fedlora" if method != "fedlora" else "adaptive"


def table(result: Mapping[str, Any]) -> Table:
    """The result as a table: accuracies and their references, then costs."""
    shown = Table(box=box.SIMPLE_HEAD, title="Result", title_justify="left", show_header=False)
    shown.add_column("what", style="bold")
    shown.add_column("value", justify="right")
    shown.add_column("note", style="dim")
    for what, value, note in (*_quality_lines(result), *_cost_lines(result)):
        shown.add_row(what, value, note)
    return shown


def _quality_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    sample = f"on {result['sampled_test_rows']:,} test texts"
    lines = [
        *_global_lines(result, sample),
        *_personalised_lines(result),
        ("before training", share(result["initial_accuracy"]), sample),
        ("majority class", share(result["majority_accuracy"]), "reference"),
        (
            "TF-IDF + linear SVM",
            share(result["tfidf_accuracy"]),
            "reference, all data in one place",
        ),
    ]
    if result["target"] is not None:
        lines += _target_lines(result)
    return lines


def _global_lines(result: Mapping[str, Any], sample: str) -> list[tuple[str, str, str]]:
    if result["global_accuracy"] is None:
        return [("accuracy", "–", "there is no global model")]
    return [
        (
            "accuracy",
            share(result["global_accuracy"]),
            f"all {result['test_rows']:,} test texts",
        ),
        ("F1", share(result["global_f1"]), _f1_note(result)),
        ("after round 1", share(result["first_accuracy"]), sample),
        ("best", share(result["best_accuracy"]), f"round {result['best_round']}, {sample}"),
    ]


def _f1_note(result: Mapping[str, Any]) -> str:
    """Which F1 score it is."""
    return "of class 1" if result["classes"] == 2 else "mean over classes (macro)"


def _personalised_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Accuracy of clients' own models; no lines if the run did not evaluate them."""
    if result["personalised_accuracy"] is None:
        return []
    clients, rows = result["personalised_clients"], result["personalised_rows"]
    note = f"mean of {clients:,} clients' own models on their own {rows:,} test texts"
    tenth = max(1, -(-clients // 10))
    of_them = f"of them: {tenth} client{'s' * (tenth > 1)}"
    failed = result["personalised_failures"]
    if failed:
        note += f"; {len(failed)} could not be evaluated ({failed[0]['reason']})"
    if lost := result["personalised_lost"]:
        note += f"; {len(lost)} had lost their client state and used the global model"
    return [
        ("personalised", share(result["personalised_accuracy"]), note),
        ("worst tenth", share(result["personalised_worst_tenth"]), of_them),
        ("deviation", share(result["personalised_deviation"]), "between them"),
        (
            "own majority class",
            share(result["own_majority_accuracy"]),
            "reference: always predict the client's most frequent class",
        ),
    ]


def _target_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    name = f"target {share(result['target'])}"
    if result["target_round"] is None:
        return [(name, "not reached", "")]
    here, modelled = (result[f"time_to_target_{clock}_s"] for clock in ("measured", "modelled"))
    note = f"round {result['target_round']}; as if clients ran in parallel (measured)"
    return [
        (name, seconds_text(here), note),
        ("", seconds_text(modelled), "on their profiles (modelled)"),
    ]


def _cost_lines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rounds, layers = result["rounds"], layers_above_the_frozen(result)
    depth = result["mean_active_layers"]
    above = "" if layers == result["num_layers"] else " above the frozen ones"
    return [
        (
            "time",
            seconds_text(result["host_wall_s"]),
            f"{rounds} rounds on this machine (measured)",
        ),
        ("training time", seconds_text(result["train_wall_s"]), "all clients one after another"),
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
            f"of {layers} layers{above} per step",
        ),
        ("activations", bytes_text(result["activation_bytes_peak"]), "peak stored for backward"),
    ]


def layers_above_the_frozen(about: Mapping[str, Any]) -> int:
    """How many layers are not frozen; drop rates and depth are about these."""
    layers: int = about["num_layers"] - about["config"]["frozen"]["layers"]
    return layers
