"""What the runs of a comparison come to: a row per member, and the target's time. Ours."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from droppeft.comparison.study_files import RunRecord, Study, Target
from droppeft.runs.ledger import SMOOTHED_EVALUATIONS, target_round


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; no deviation of a single one."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class VariantRow:
    """A member on one data set and model; over the seeds that have a result.

    Attributes:
        member: which.
        seeds: how many have a result.
        failures: why others have none, each reason once.
        accuracy: of the global model on the whole test set; ``None`` without such a model.
        f1: of the same: of class 1 where there are two classes, else the mean over classes.
        personalised: mean over clients of their own models on their own test rows.
        worst_tenth: of the clients, by the same measure.
        between_devices: standard deviation of a run's clients, by the same measure.
        unmeasured: clients of all runs that could not be measured so.
        reached: how many seeds reached their target; ``None`` without one, or without a global
            model that could.
        time_to_target_measured_s, time_to_target_modelled_s: of those that did, ``None`` unless
            all seeds did.
        speed_up_measured, speed_up_modelled: the baseline's mean time through the member's, over
            the member's seeds; ``None`` unless both reached their target on all of these.
        activation_bytes_peak: the largest of any run.
        upload_bytes, download_bytes: of a run, mean.
        energy_modelled_j, round_modelled_s, round_measured_s: of a whole run, mean.
    """

    variant: str
    seeds: int
    failures: tuple[str, ...]
    accuracy: Spread | None
    f1: Spread | None
    personalised: Spread | None
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
    """All members on one data set and model.

    Attributes:
        data, model: which.
        target: accuracy whose time was asked for, mean over seeds; ``None`` if there is none.
        majority, tfidf: test accuracy of train's most frequent class, and of TF-IDF with a linear
            SVM on all training texts in one place; ``None`` where no run knows it, or members of
            one seed have different ones.
        own_majority: mean over clients, and over runs, of a client's most frequent class on its
            own test rows.
        rows: in the order of the members.
    """

    data: str
    model: str
    target: float | None
    majority: float | None
    tfidf: float | None
    own_majority: float | None
    rows: tuple[VariantRow, ...]


def summary(study: Study, records: Sequence[RunRecord]) -> list[Part]:
    """Sum up what there is, by data set and model in the order of the cells."""
    places = dict.fromkeys(one.place for one in records)
    return [_part(study, [one for one in records if one.place == p]) for p in places]


def _part(study: Study, records: Sequence[RunRecord]) -> Part:
    targets = target_accuracies(study.target, records)
    by_variant = {name: [one for one in records if one.variant == name] for name in study.variants}
    base = study.baseline or next(iter(by_variant))
    times = {name: _times(runs, targets) for name, runs in by_variant.items()}
    known = [target for target in targets.values() if target is not None]
    rows = (_row(name, runs, times[name], times[base]) for name, runs in by_variant.items())
    return Part(
        *records[0].place,
        target=fmean(known) if known else None,
        majority=_reference(records, "majority_accuracy"),
        tfidf=_reference(records, "tfidf_accuracy"),
        own_majority=_reference(records, "own_majority_accuracy"),
        rows=tuple(rows),
    )


def _reference(records: Sequence[RunRecord], key: str) -> float | None:
    """Mean over seeds; ``None`` where members of one seed differ, as with a split of their own."""
    found: dict[int, set[float]] = {}
    for run in records:
        if run.result is not None and run.result[key] is not None:
            found.setdefault(run.seed, set()).add(run.result[key])
    if not found or any(len(values) > 1 for values in found.values()):
        return None
    return fmean(value for [value] in found.values())


def target_accuracies(
    target: Target | None, records: Sequence[RunRecord]
) -> Mapping[int, float | None]:
    """The number that is asked for, by seed; of a member what it ends with on the same seed.

    What it ends with is the mean of its last evaluations, ``None`` if that run has no result or no
    global model. A
    seed of its own each, since seeds differ by more than the distance that is asked for.
    """
    if target is None:
        return {}
    if target.accuracy is not None:
        return {one.seed: target.accuracy for one in records}
    runs = {one.seed: one for one in records if one.variant == target.variant}
    return {
        seed: fmean(found[-SMOOTHED_EVALUATIONS:]) - target.minus
        if run.result is not None and (found := _evaluations(run))
        else None
        for seed, run in runs.items()
    }


def _evaluations(records: RunRecord) -> list[float]:
    found = [row["global_accuracy"] for row in records.rows]
    return [accuracy for accuracy in found if accuracy is not None]


Times = Mapping[str, Mapping[int, float | None]]
"""Seconds to the target by clock and seed; ``None`` for a run that failed or did not reach it."""


def _times(runs: Sequence[RunRecord], targets: Mapping[int, float | None]) -> Times:
    return {
        clock: {
            run.seed: time_to_target(run, targets.get(run.seed), f"round_{clock}_s")
            for run in runs
            if targets
        }
        for clock in ("measured", "modelled")
    }


def time_to_target(run: RunRecord, target: float | None, column: str) -> float | None:
    """Seconds until a run reaches an accuracy, by a column of its rounds.

    ``None`` if it failed or does not reach it, or if a round on the way has no such time.
    """
    if run.result is None:
        return None
    evaluations = [(row["round"], row["global_accuracy"]) for row in run.rows]
    reached = target_round(evaluations, run.result["initial_accuracy"], target)
    times = [row[column] for row in run.rows if reached and row["round"] <= reached]
    return sum(times) if times and None not in times else None


def _row(
    name: str,
    runs: Sequence[RunRecord],
    own: Times,
    base: Times,
) -> VariantRow:
    results = [run.result for run in runs if run.result is not None]
    spreads = {clock: _if_all(list(times.values())) for clock, times in own.items()}
    reached = [time for time in own["measured"].values() if time is not None]

    def mean_of(key: str) -> float | None:
        return _mean([result[key] for result in results])

    return VariantRow(
        variant=name,
        seeds=len(results),
        failures=tuple(dict.fromkeys(run.failure for run in runs if run.failure is not None)),
        accuracy=_if_all([result["global_accuracy"] for result in results]),
        f1=_if_all([result["global_f1"] for result in results]),
        personalised=_if_all([result["personalised_accuracy"] for result in results]),
        worst_tenth=_if_all([result["personalised_worst_tenth"] for result in results]),
        between_clients=_if_all([result["personalised_deviation"] for result in results]),
        unmeasured=sum(result["unmeasured_clients"] or 0 for result in results),
        reached=len(reached) if own["measured"] and any(map(_evaluations, runs)) else None,
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


def _if_all(times: Sequence[float | None]) -> Spread | None:
    known = [time for time in times if time is not None]
    return _spread(known) if len(known) == len(times) else None


def _spread(values: Iterable[float]) -> Spread | None:
    found = list(values)
    if not found:
        return None
    return Spread(fmean(found), stdev(found) if len(found) > 1 else None, len(found))


def _speed_up(base: Mapping[int, float | None], own: Mapping[int, float | None]) -> float | None:
    above, below = _if_all([base.get(seed) for seed in own]), _if_all(list(own.values()))
    return above.mean / below.mean if above and below and below.mean > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
