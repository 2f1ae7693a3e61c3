"""The parts of the results about layers that stay personal."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from studies import outcome_of, runs_of, shown_settings, spread
from tables import markdown_table, read_compared, was_compared

from droppeft.comparison.study_files import RunRecord, Study
from droppeft.comparison.summary import summary
from droppeft.comparison.writers import COLUMNS
from droppeft.sharing.selection import count_of

PERSONAL = """\
## Which half of the layers is personal, and other ways to personalise

`droppeft compare benchmarks/personalisation/study.toml`: development data (20 Newsgroups), the
built-in model, {clients} clients, {cohort} a round, {rounds} rounds of {steps} steps of {batch}
texts at full depth, Dirichlet alpha {alpha}, {seeds}. All rows from *relative gradient norm* to
*CKA* share half of the layers. Personalised: mean over all clients of each one's own model on its
own test texts; worst tenth: of the clients. Mean and standard deviation over seeds; *over sharing
all*: in points, on the same seed, every seed; least covered: part of a round's clients, mean over
rounds, that sent the layer that the fewest sent. Traffic is what was sent in a whole run.
"""
HETEROGENEITY = """\
## How much to share, from alike to unlike clients

`droppeft compare benchmarks/sharing_heterogeneity/study.toml`: as above, but for forwards in bf16,
layers chosen by relative gradient norm, {seeds}. Halves of layers are rounded up: a quarter of six
is two. With four classes each there are twenty clients, so that every class has one. *Over sharing
all*: in points, on the same split and seed, every seed.
"""
CONFIRMATION = """\
## Half of the layers personal, on other data and another model

`droppeft compare benchmarks/sharing_confirmation/study.toml`, run once: {clients} clients, {cohort}
a round, {rounds} rounds of {steps} steps of {batch} texts, forwards in bf16, Dirichlet alpha
{alpha}, {seeds}; MRPC is development data, AG News and MNLI are not. *Over sharing all*: in points,
on the same split and seed, every seed.
"""
NEWCOMERS = """\
## Clients that never trained

`droppeft compare benchmarks/newcomers/study.toml`: development data (20 Newsgroups), the built-in
model, {clients} clients of which {cohort} train in each of {rounds} rounds, {steps} steps of
{batch} texts, forwards in bf16, Dirichlet alpha {alpha}, {seeds}. Accuracy on clients' own
test texts, mean over clients: those that trained, those that never did, and these after one epoch
on their own texts, of which nothing is sent. Mean and standard deviation over seeds.
"""
NEWCOMER_KEYS = (
    "global_accuracy",
    "personalised_accuracy_trained",
    "newcomers_accuracy",
    "newcomers_accuracy_after_epoch",
)
NEWCOMER_COLUMNS = ("run", "global", "trained", "newcomers", "after an epoch", "newcomers a run")
ABLATION = """\
## The method's parts, each taken away

`droppeft compare benchmarks/ablation/study.toml`: as above, alpha {alpha}, {seeds}. Layer dropout
with rates from the configurator (budgeted Thompson sampling, rewards by agreement), untrained
layers as one of its choices (*prefix*), half of the layers shared by relative gradient norm
(rounded up: two of three); *half frozen*: LoRA in the last half of the layers alone, whose inputs
are cached. Without the configurator there are no untrained layers either. *Over all parts*: in
points, on the same seed, every seed. To target (modelled): until what *none of them* ends with,
less a point. Modelled: the whole run; activations: the largest peak of a local training.
"""
ACCURACIES = ("global", "personalised", "worst tenth")


def personal_sections() -> list[str]:
    """A section per study that was made."""
    makers: dict[str, Callable[[Study, Sequence[RunRecord]], str]] = {
        "personalisation": _personalisation,
        "sharing_heterogeneity": _heterogeneity,
        "sharing_confirmation": _confirmation,
        "newcomers": _newcomers,
        "ablation": _ablation,
    }
    return [make(*read_compared(name)) for name, make in makers.items() if was_compared(name)]


def _personalisation(study: Study, records: Sequence[RunRecord]) -> str:
    runs = runs_of(records)
    lines = [
        (
            variant,
            *_accuracies(own),
            *_differences(own, runs["share all"]),
            _least_covered(own),
            *_traffic(own),
        )
        for variant, own in runs.items()
    ]
    head, columns = PERSONAL.format(**shown_settings(runs)), [*_columns("way", "sharing all")]
    columns[-2:-2] = ["least covered"]
    return f"{head}\n{markdown_table(columns, lines)}"


def _least_covered(own: Mapping[int, RunRecord]) -> str:
    """Part of a round's clients that sent the layer that the fewest sent."""
    parts = []
    for run in own.values():
        counts = [row["coverage"] for row in run.rows]
        sent = [fmean(layer) for layer in zip(*counts, strict=True)]
        parts.append(min(sent) / outcome_of(run)["cohort_size"])
    return f"{fmean(parts):.0%}"


def _heterogeneity(study: Study, records: Sequence[RunRecord]) -> str:
    runs = runs_of(records)
    lines = []
    for variant, own in runs.items():
        split = variant.rpartition(", ")[0]
        known = outcome_of(next(iter(own.values())))
        layers = known["num_layers"]
        part = f"{count_of(known['sharing_fraction'], layers)} of {layers}"
        whole = runs.get(f"{split}, all", {})
        lines.append((split, part, *_accuracies(own), *_differences(own, whole), *_traffic(own)))
    columns = ("clients", *_columns("shared", "sharing all"))
    return f"{HETEROGENEITY.format(**shown_settings(runs))}\n{markdown_table(columns, lines)}"


def _confirmation(study: Study, records: Sequence[RunRecord]) -> str:
    lines = []
    for data, model in dict.fromkeys(one.place for one in records):
        runs = runs_of([one for one in records if one.place == (data, model)])
        for variant, own in runs.items():
            differences = _differences(own, runs.get("share all", {}))
            place = (Path(data).name, Path(model).name)
            lines.append((*place, variant, *_accuracies(own), *differences, *_traffic(own)))
    columns = ("data", "model", *_columns("way", "sharing all"))
    head = CONFIRMATION.format(**shown_settings(runs_of(records)))
    return f"{head}\n{markdown_table(columns, lines)}"


def _newcomers(study: Study, records: Sequence[RunRecord]) -> str:
    runs = runs_of(records)
    lines = []
    for variant, own in runs.items():
        results = _results(own)
        count = fmean(result["newcomers"] or 0 for result in results)
        found = (spread([result[key] for result in results]) for key in NEWCOMER_KEYS)
        lines.append((variant, *found, f"{count:.1f}"))
    return f"{NEWCOMERS.format(**shown_settings(runs))}\n{markdown_table(NEWCOMER_COLUMNS, lines)}"


def _ablation(study: Study, records: Sequence[RunRecord]) -> str:
    runs = runs_of(records)
    [part] = summary(study, records)
    to_target = {row.variant: COLUMNS["to target, modelled"](row) for row in part.rows}
    lines = []
    for variant, own in runs.items():
        results = _results(own)
        peak = max(result["activation_bytes_peak"] or 0 for result in results)
        seconds = fmean(sum(row["round_modelled_s"] for row in one.rows) for one in own.values())
        lines.append(
            (
                variant,
                *_accuracies(own),
                *_differences(own, runs["all parts"]),
                to_target[variant],
                f"{seconds:.1f} s",
                f"{peak / 1e6:.1f} MB",
                *_traffic(own),
            )
        )
    columns = [*_columns("run", "all parts")]
    columns[-2:-2] = ["to target", "modelled", "activations"]
    return f"{ABLATION.format(**shown_settings(runs))}\n{markdown_table(columns, lines)}"


def _columns(what: str, other: str) -> tuple[str, ...]:
    return (
        what,
        *ACCURACIES,
        f"over {other}: global",
        "personalised",
        "up",
        "down",
    )


def _results(own: Mapping[int, RunRecord]) -> list[Mapping[str, float | None]]:
    return [one.result for one in own.values() if one.result is not None]


def _accuracies(own: Mapping[int, RunRecord]) -> list[str]:
    keys = ("global_accuracy", "personalised_accuracy", "personalised_worst_tenth")
    return [spread([result[key] for result in _results(own)]) for key in keys]


def _differences(own: Mapping[int, RunRecord], other: Mapping[int, RunRecord]) -> list[str]:
    found = []
    for key in ("global_accuracy", "personalised_accuracy"):
        points = [
            100 * (mine - theirs)
            for seed, run in own.items()
            if seed in other and run is not other[seed]
            if (mine := _value(run, key)) is not None
            if (theirs := _value(other[seed], key)) is not None
        ]
        found.append(", ".join(f"{one:+.1f}" for one in points) or "–")
    return found


def _value(run: RunRecord, key: str) -> float | None:
    value: float | None = outcome_of(run)[key]
    return value


def _traffic(own: Mapping[int, RunRecord]) -> list[str]:
    results = _results(own)
    return [
        f"{fmean(result[key] or 0 for result in results) / 1e6:.1f} MB"
        for key in ("upload_bytes", "download_bytes")
    ]
