"""Summarise the runs of a comparison: a row per variant, and times to the target. Ours."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from droppeft.comparison.study_files import RunRecord, Study, Target
from droppeft.runs.summary import SMOOTHED_EVALUATIONS, target_round
from droppeft.tasks.metrics import CHRF, METRICS, ROUGE_L, Metric, primary_metric

BASELINE = "fedlora"
"""The variant with which the others are compared, if there is one of this name."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over ``count`` seeds; one seed has no deviation."""

    mean: float
    deviation: float | None
    count: int


def spread_text(metric: Metric, spread: Spread | None) -> str:
    """A mean with its deviation, as ``.588 ± .010``; a dash for ``None``."""
    if spread is None:
        return "–"
    deviation = "" if spread.deviation is None else f" ± {metric.text(spread.deviation)}"
    return f"{metric.text(spread.mean)}{deviation}"


@dataclass(frozen=True)
class VariantRow:
    """Results of a variant on one data set and model, over the seeds that have a result.

    Attributes:
        variant: its name.
        seeds: how many have a result.
        failures: why the other seeds have none, each reason once.
        metric: the task's primary metric, which the following values are of.
        quality: of the global model on the whole test set; ``None`` if there is no global model.
        quality_by_seed: the same of each seed that has a result.
        f1: F1 of the global model: of class 1 with two classes, otherwise the mean over classes;
            ``None`` if the task has none.
        rouge_l, chrf: of the texts that the global model writes; ``None`` if it writes none.
        personalised: of each client's own model on its own test rows, mean over clients.
        personalised_rouge_l: of the texts that clients' own models write, mean over clients;
            ``None`` if they write none.
        worst_tenth: of ``personalised``, over the tenth of clients whose models are worst.
        between_clients: standard deviation over the clients of a run.
        unmeasured: clients of all runs whose own model could not be evaluated.
        reached: how many seeds reached the target; ``None`` without a target or a global model.
        time_to_target_measured_s, time_to_target_modelled_s: ``None`` unless all seeds reached it.
        speed_up_measured, speed_up_modelled: the baseline's mean time divided by the variant's,
            over the variant's seeds; ``None`` unless both reached the target on all of them.
        activation_bytes_peak: the largest of any run.
        upload_bytes, download_bytes: of a whole run, mean over seeds.
        energy_modelled_j, round_modelled_s, round_measured_s: of a whole run, mean over seeds.
    """

    variant: str
    seeds: int
    failures: tuple[str, ...]
    metric: Metric
    quality: Spread | None
    quality_by_seed: Mapping[int, float | None]
    f1: Spread | None
    rouge_l: Spread | None
    chrf: Spread | None
    personalised: Spread | None
    personalised_rouge_l: Spread | None
    worst_tenth: Spread | None
    between_clients: Spread | None
    unmeasured: int
    reached: int | None
    time_to_target_measured_s: Spread | None
    time_to_target_modelled_s: Spread | None
    speed_up_measured: float | None
    speed_up_modelled: float | None
    activation_bytes_peak: int | None
    upload_bytes: float | None
    download_bytes: float | None
    energy_modelled_j: float | None
    round_modelled_s: float | None
    round_measured_s: float | None


@dataclass(frozen=True)
class Part:
    """All variants on one data set and model.

    Attributes:
        data, model: of these runs.
        metric: the task's primary metric.
        baseline: name of the variant with which the others are compared.
        target: the quality whose time was asked for, mean over seeds; ``None`` if there is none.
        target_metric: its metric; the primary one if there is no target.
        untrained: values of the model before training, by the label of their metric: those of the
            primary metric and of generated texts, mean over seeds; empty where no texts are
            generated.
        majority, tfidf: test accuracy of the training rows' most frequent class, and of TF-IDF
            with a linear SVM on the training texts of all clients together; ``None`` where no run
            knows it, or where runs of the same seed differ.
        own_majority: accuracy of each client's most frequent class on its own test rows, mean over
            clients and runs.
        rows: in the order of the variants.
    """

    data: str
    model: str
    metric: Metric
    baseline: str
    target: float | None
    target_metric: Metric
    untrained: Mapping[str, float]
    majority: float | None
    tfidf: float | None
    own_majority: float | None
    rows: tuple[VariantRow, ...]


def summary(study: Study, records: Sequence[RunRecord]) -> list[Part]:
    """Summarise the runs that there are, by data set and model in the order of the runs."""
    places = dict.fromkeys(run.place for run in records)
    return [_part(study, [run for run in records if run.place == place]) for place in places]


def baseline_of(study: Study) -> str:
    """The named baseline, else ``fedlora`` if it is among the variants, else the first variant."""
    if study.baseline is not None:
        return study.baseline
    return BASELINE if BASELINE in study.variants else study.variants[0]


def _part(study: Study, records: Sequence[RunRecord]) -> Part:
    metric = metric_of(records)
    aimed = METRICS[study.target.metric] if study.target and study.target.metric else metric
    targets = target_values(study.target, records, aimed)
    by_variant = {name: [run for run in records if run.variant == name] for name in study.variants}
    base = baseline_of(study)
    times = {name: _times(runs, targets, aimed) for name, runs in by_variant.items()}
    known = [target for target in targets.values() if target is not None]
    rows = (_row(name, runs, metric, times[name], times[base]) for name, runs in by_variant.items())
    return Part(
        *records[0].place,
        metric=metric,
        baseline=base,
        target=fmean(known) if known else None,
        target_metric=aimed,
        untrained=_untrained(records, metric),
        majority=_reference(records, "majority_accuracy"),
        tfidf=_reference(records, "tfidf_accuracy"),
        own_majority=_reference(records, "own_majority_accuracy"),
        rows=tuple(rows),
    )


def _untrained(records: Sequence[RunRecord], metric: Metric) -> dict[str, float]:
    if not any(run.result is not None and run.result["chrf_before"] is not None for run in records):
        return {}
    columns = {metric.label: metric.key("initial")}
    columns |= {one.label: f"{one.name}_before" for one in (ROUGE_L, CHRF)}
    found = {label: _reference(records, column) for label, column in columns.items()}
    return {label: value for label, value in found.items() if value is not None}


def _reference(records: Sequence[RunRecord], key: str) -> float | None:
    """Mean over seeds; ``None`` where runs of the same seed differ, for instance in their split."""
    found: dict[int, set[float]] = {}
    for run in records:
        if run.result is not None and run.result[key] is not None:
            found.setdefault(run.seed, set()).add(run.result[key])
    if not found or any(len(values) > 1 for values in found.values()):
        return None
    return fmean(value for [value] in found.values())


def metric_of(records: Sequence[RunRecord]) -> Metric:
    """The primary metric of runs of the same task."""
    return primary_metric(next((run.result for run in records if run.result is not None), {}))


def target_values(
    target: Target | None, records: Sequence[RunRecord], metric: Metric
) -> Mapping[int, float | None]:
    """The target's value by seed.

    If the target is a variant, it is the mean of the last evaluations of that variant's run with
    the same seed, worse by ``minus``; ``None`` if that run has no result or no global model. It is
    computed per seed because seeds differ by more than ``minus``.
    """
    if target is None:
        return {}
    if target.value is not None:
        return {run.seed: target.value for run in records}
    worse = -target.minus if metric.higher_is_better else target.minus
    runs = {run.seed: run for run in records if run.variant == target.variant}
    return {
        seed: fmean(values[-SMOOTHED_EVALUATIONS:]) + worse
        if run.result is not None and (values := _evaluations(run, metric))
        else None
        for seed, run in runs.items()
    }


def _evaluations(run: RunRecord, metric: Metric) -> list[float]:
    """Values of the global model, in the rounds that evaluated it."""
    values = [row[metric.key("global")] for row in run.rows]
    return [value for value in values if value is not None]


Times = Mapping[str, Mapping[int, float | None]]
"""Seconds to the target by clock and seed; ``None`` for a run that failed or did not reach it."""


def _times(runs: Sequence[RunRecord], targets: Mapping[int, float | None], metric: Metric) -> Times:
    return {
        clock: {
            run.seed: time_to_target(run, targets.get(run.seed), f"round_{clock}_s", metric)
            for run in runs
            if targets
        }
        for clock in ("measured", "modelled")
    }


def time_to_target(
    run: RunRecord, target: float | None, column: str, metric: Metric
) -> float | None:
    """Seconds until a run reaches the target, summed over a column of its rounds.

    ``None`` if the run failed or does not reach it, or if a round until then has no such time.
    """
    if run.result is None:
        return None
    evaluations = [(row["round"], row[metric.key("global")]) for row in run.rows]
    reached = target_round(evaluations, run.result[metric.key("initial")], target, metric)
    times = [row[column] for row in run.rows if reached and row["round"] <= reached]
    return sum(times) if times and None not in times else None


def _row(
    name: str, runs: Sequence[RunRecord], metric: Metric, own: Times, base: Times
) -> VariantRow:
    """A variant's row from its runs, its times to the target and those of the baseline."""
    results = [run.result for run in runs if run.result is not None]
    spreads = {clock: _if_all(list(times.values())) for clock, times in own.items()}
    reached = [time for time in own["measured"].values() if time is not None]

    def mean_of(key: str) -> float | None:
        return _mean([result[key] for result in results])

    return VariantRow(
        variant=name,
        seeds=len(results),
        failures=tuple(dict.fromkeys(run.failure for run in runs if run.failure is not None)),
        metric=metric,
        quality=_if_all([result[metric.key("global")] for result in results]),
        quality_by_seed={
            run.seed: run.result[metric.key("global")] for run in runs if run.result is not None
        },
        f1=_if_all([result["global_f1"] for result in results]),
        rouge_l=_if_all([result["rouge_l_after"] for result in results]),
        chrf=_if_all([result["chrf_after"] for result in results]),
        personalised=_if_all([result[metric.key("personalised")] for result in results]),
        personalised_rouge_l=_if_all([result[ROUGE_L.key("personalised")] for result in results]),
        worst_tenth=_if_all([result["personalised_worst_tenth"] for result in results]),
        between_clients=_if_all([result["personalised_deviation"] for result in results]),
        unmeasured=sum(result["unmeasured_clients"] or 0 for result in results),
        reached=len(reached)
        if own["measured"] and any(_evaluations(run, metric) for run in runs)
        else None,
        time_to_target_measured_s=spreads["measured"],
        time_to_target_modelled_s=spreads["modelled"],
        speed_up_measured=_speed_up(base["measured"], own["measured"]),
        speed_up_modelled=_speed_up(base["modelled"], own["modelled"]),
        activation_bytes_peak=max((r["activation_bytes_peak"] for r in results), default=None),
        upload_bytes=mean_of("upload_bytes"),
        download_bytes=mean_of("download_bytes"),
        energy_modelled_j=mean_of("energy_modelled_j"),
        round_modelled_s=mean_of("round_modelled_s"),
        round_measured_s=mean_of("round_measured_s"),
    )


def _if_all(values: Sequence[float | None]) -> Spread | None:
    """Mean and deviation; ``None`` if one of the values is."""
    known = [value for value in values if value is not None]
    return _spread(known) if len(known) == len(values) else None


def _spread(values: Iterable[float]) -> Spread | None:
    found = list(values)
    if not found:
        return None
    return Spread(fmean(found), stdev(found) if len(found) > 1 else None, len(found))


def _speed_up(base: Mapping[int, float | None], own: Mapping[int, float | None]) -> float | None:
    of_base, of_own = _if_all([base.get(seed) for seed in own]), _if_all(list(own.values()))
    return of_base.mean / of_own.mean if of_base and of_own and of_own.mean > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
