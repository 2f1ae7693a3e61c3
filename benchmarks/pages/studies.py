"""Read comparisons, and say of their runs what several tables say."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

from benchmarks.pages.markdown import markdown_table, processor
from droppeft.comparison.study_files import Row, RunRecord, Study, read_tables

STUDIES = Path(__file__).parents[1]
"""Folders of comparisons, by name."""

REMOVED = {
    *("fedadaopt", "gradient SNR", "weight change", "halving", "successive_halving"),
    *("gradient_snr", "weight_change", "a third, a draw per turn, over everyone"),
}
"""Variants of recorded results that droppeft no longer offers: tables leave them out."""

ADAPTIVE = {
    "droppeft": "adaptive, half personal",
    "droppeft, all shared": "adaptive",
    "droppeft, all shared, IA3": "adaptive, IA3",
    "all shared": "adaptive",
    "all shared, IA3": "adaptive, IA3",
    "droppeft, bottlenecks": "adaptive, half personal, bottlenecks",
    "droppeft, as in the paper": "DropPEFT, as in the paper",
}
"""Variants whose name of today differs from the recorded one, in the studies of `OF_ADAPTIVE`."""

OF_ADAPTIVE = ("contest", "heterogeneity", "ia3")

Seeds = Mapping[int, RunRecord]
"""Runs of a variant by seed."""

Runs = Mapping[str, Seeds]
"""Finished runs by variant and seed."""


def read_compared(name: str) -> tuple[Study, list[RunRecord]]:
    """What a study asked, and its runs."""
    return _read(STUDIES / name)


@cache
def _read(folder: Path) -> tuple[Study, list[RunRecord]]:
    return read_tables(folder)


def label(study: str, variant: str) -> str:
    """The name of a variant as tables show it."""
    if study.startswith(OF_ADAPTIVE):
        variant = ADAPTIVE.get(variant, variant)
    return variant.replace(", last half", ", upper half").replace(", last third", ", upper third")


def runs_of(records: Sequence[RunRecord]) -> Runs:
    """Those that have a result, variants in their own order."""
    done = [one for one in records if one.result is not None]
    return {
        variant: {one.seed: one for one in done if one.variant == variant}
        for variant in dict.fromkeys(one.variant for one in done)
    }


def outcome_of(run: RunRecord) -> Row:
    """Columns of a run that has a result."""
    assert run.result is not None
    return run.result


def runs_table(studies: Sequence[str]) -> str:
    """What was run: data, clients, rounds, seeds and machine of each comparison."""
    columns = ("study", "data", "clients", "rounds", "seeds", "a run took")
    return markdown_table(columns, map(_about, studies))


def _about(name: str) -> Sequence[str]:
    _, records = read_compared(name)
    results = [outcome_of(one) for one in records if one.result is not None]
    seconds = sorted(result["host_wall_s"] for result in results)[len(results) // 2]
    machines = dict.fromkeys(processor(one["machine"]) for one in results)
    alphas = _each(results, "alpha")
    return (
        f"`{name}`",
        ", ".join(dict.fromkeys(Path(one.data).name for one in records)),
        f"{_each(results, 'clients')}, {_each(results, 'cohort_size')} a round; alpha {alphas}",
        f"{_each(results, 'rounds')} of {_each(results, 'local_steps')} steps",
        _seeds(records),
        f"{seconds:.0f} s on {' or '.join(machines)}",
    )


def _each(results: Iterable[Row], key: str) -> str:
    found = dict.fromkeys(result[key] for result in results)
    return ", ".join("–" if value is None else f"{value:g}" for value in found)


def _seeds(records: Sequence[RunRecord]) -> str:
    """How many seeds variants have; a range where some are missing."""
    done = Counter((one.place, one.variant) for one in records if one.result is not None)
    least, most = min(done.values()), max(done.values())
    return str(most) if least == most else f"{least} to {most}"


def final_loss(run: RunRecord, last: int | None = None) -> float:
    """Of the global model: mean of the last two evaluations, so that one alone decides nothing.

    Args:
        last: the round after which it is asked for, instead of the run's last one.
    """
    return fmean(_evaluations(run, "global_loss", last)[-2:])


def final_accuracy(run: RunRecord) -> float:
    """Of the global model, over the same evaluations."""
    return fmean(_evaluations(run, "global_accuracy")[-2:])


def gaps(
    one: Seeds, other: Seeds, value: Callable[[RunRecord], float] = final_loss
) -> dict[int, float]:
    """First less second, by the seeds that both have."""
    return {seed: value(one[seed]) - value(other[seed]) for seed in sorted(one.keys() & other)}


def verdict(differences: Iterable[float]) -> str:
    """Whether all seeds are above 0, as was predicted, or below."""
    found = list(differences)
    if all(one > 0 for one in found):
        return "holds"
    return "fails" if all(one < 0 for one in found) else "open"


def _evaluations(run: RunRecord, key: str, last: int | None = None) -> list[float]:
    rows = [row for row in run.rows if last is None or row["round"] <= last]
    return [row[key] for row in rows if row[key] is not None]
