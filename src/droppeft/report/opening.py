"""What a run prints before its first round: what will happen, and about how long it takes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from droppeft.quantities import about_minutes, counted, share
from droppeft.tasks.metrics import primary_metric

BUILT_IN = {"builtin": "built in"}


def opening(about: Mapping[str, Any], folder: Path | None) -> Group:
    """The sentences about method, model, data, clients, rounds, references, time and folder.

    Args:
        about: what identifies the run, and ``expected_wall_s``, ``workers`` and
            ``why_fewer_workers``.
        folder: of the run, or ``None``.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan")
    grid.add_column(overflow="fold")
    for name, text in facts(about, folder):
        grid.add_row(name, Text(text))
    title = Text.assemble(("droppeft", "bold"), f" · {about['method']} · seed {about['seed']}")
    return Group(title, grid)


def facts(about: Mapping[str, Any], folder: Path | None) -> Iterator[tuple[str, str]]:
    """Yield what :func:`opening` says, as pairs of name and text."""
    yield "method", about["method_summary"]
    yield "model", _model(about)
    yield "compute", about["precision"]
    yield "data", f"{_name(about['data'])}: {_texts(about)}{_classes(about)}"
    yield from labelled(about["data_findings"]["sentences"])
    partition = _partition(about["config"]["partition"])
    yield "clients", f"{counted(about['clients'], 'client')}; {partition}"
    yield "rounds", _rounds(about)
    if about["why_fewer_workers"] is not None:
        yield "", about["why_fewer_workers"]
    if sharing := _shared(about["config"]["sharing"]):
        yield "sharing", sharing
    if about.get("calibration") and about["calibration"]["rates"]:
        yield "dropout", _calibrated(about["calibration"])
    if about["privacy"] is not None:
        yield "privacy", _privacy(about["privacy"])
    yield "devices", about["no_clock_reason"] or f"{', '.join(about['profiles'])} (modelled)"
    yield "to beat", _to_beat(about)
    if folder is not None:
        yield "results", str(folder)
    if about["expected_wall_s"] is not None:
        yield "time", f"{about_minutes(about['expected_wall_s'])} on this machine (estimated)"


def labelled(sentences: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The sentences about findings in the data, as rows of which the first has a label."""
    for number, sentence in enumerate(sentences):
        yield "" if number else "check", sentence


def _texts(about: Mapping[str, Any]) -> str:
    if about["config"]["partition"]["kind"] == "sites":
        return f"{counted(about['test_rows'], 'text')} to test"
    return f"{counted(about['train_rows'], 'text')} to train and {about['test_rows']:,} to test"


def _privacy(found: Mapping[str, Any]) -> str:
    return (
        f"epsilon {found['epsilon']:.3g} and delta {found['delta']:g} for each client after all "
        f"rounds; noise {found['noise_multiplier']:.3g} x {found['clip_norm']:g}, each client is "
        f"drawn with probability {found['sampling_probability']:.3g}"
    )


def _name(name: str) -> str:
    return BUILT_IN.get(name, name)


def _classes(about: Mapping[str, Any]) -> str:
    if about["task"] != "classification":
        return ""
    return f", {counted(about['classes'], 'class', 'classes')}"


def _to_beat(about: Mapping[str, Any]) -> str:
    """The references, or the quality before training where there are none."""
    if "majority_accuracy" in about:
        return (
            f"most frequent class {share(about['majority_accuracy'])}, TF-IDF + linear SVM on all "
            f"texts {share(about['tfidf_accuracy'])}"
        )
    metric = primary_metric(about)
    return f"the model before training, {metric.label} {metric.text(about[metric.key('initial')])}"


def _model(about: Mapping[str, Any]) -> str:
    trained, frozen = about["trainable_parameters"], about["config"]["frozen"]["layers"]
    below = f"; {_frozen(frozen)}" if frozen else ""
    return (
        f"{_name(about['model'])}: {counted(about['num_layers'], 'layer')}, "
        f"{about['parameters'] / 1e6:.1f} M parameters, {trained:,} of "
        f"{_trained_parts(about)} trained{below}"
    )


def _frozen(layers: int) -> str:
    return "the lowest layer is frozen" if layers == 1 else f"the lower {layers} layers are frozen"


def _trained_parts(about: Mapping[str, Any]) -> str:
    return "adapters and head" if about["task"] == "classification" else "adapters"


def _partition(settings: Mapping[str, Any]) -> str:
    """How the rows are spread over the clients."""
    return {
        "iid": "texts spread at random",
        "dirichlet": f"classes spread unevenly (Dirichlet, alpha {settings['alpha']:g})",
        "dirichlet_by_client": "each has its own mix of classes "
        f"(Dirichlet, alpha {settings['alpha']:g})",
        "pathological": f"each has {settings['classes_per_client']} of the classes",
        "natural": f"each has the texts of one value of column {settings.get('key')}",
        "sites": "each brings texts of its own",
    }[settings["kind"]]


def _rounds(about: Mapping[str, Any]) -> str:
    training, drawn, cohort = about["config"]["training"], about["drawn_size"], about["cohort_size"]
    epochs, workers = training.get("local_epochs"), about["workers"]
    work = counted(training["local_steps"], "step") if epochs is None else counted(epochs, "epoch")
    first = f" (the first {cohort} {'is' if cohort == 1 else 'are'} merged)"
    return (
        f"{about['planned_rounds']}; in each, {counted(drawn, 'client')}"
        f"{first if drawn > cohort else ''} {'trains' if drawn == 1 else 'train'} for {work} of "
        f"{counted(training['batch_size'], 'text')}"
        f"{f', {workers} at a time' if workers > 1 else ''}"
    )


def _calibrated(found: Mapping[str, Any]) -> str:
    """Which layers are never dropped, and the rates of the others."""
    kept = [str(layer) for layer, rate in enumerate(found["rates"]) if not rate]
    dropped = [rate for rate in found["rates"] if rate]
    if not dropped:
        return "no layer is dropped"
    low, high = share(min(dropped)), share(max(dropped))
    rates = f"rate {low}" if low == high else f"rates {low} to {high}"
    never = f"never dropped: {', '.join(kept)}; the other layers: " if kept else ""
    return f"{never}{rates}, by what each layer is worth"


def _shared(sharing: Mapping[str, Any]) -> str:
    """What clients share, if it is not everything."""
    parts = []
    if sharing["fraction"] < 1:
        criterion = sharing["criterion"].replace("_", " ")
        parts.append(f"{sharing['fraction']:.0%} of the layers are shared, by {criterion}")
    if sharing["head"] == "personal":
        parts.append("the head is personal")
    return "; ".join(parts)
