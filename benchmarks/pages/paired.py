"""Tables of paired differences: a variant beside the baseline of its study, seed by seed."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from scipy.stats import t as student

from benchmarks.pages import studies
from benchmarks.pages.markdown import markdown_table
from benchmarks.pages.studies import label
from droppeft.comparison.study_files import RunRecord
from droppeft.tasks.metrics import primary_metric

CONFIDENCE = 0.95

Result = Mapping[str, Any]


def paired_differences(study: str) -> str:
    """Each variant beside the baseline: how much worse at most, and at which share of the costs.

    The bound is one-sided: with a probability of 95 %, the mean difference is not worse (Student's
    t, over seeds). Costs are medians over seeds of the share of the baseline's, with the range.
    """
    known, records = studies.read_compared(study)
    baseline = known.baseline or known.variants[0]
    runs = {(one.variant, one.seed): one for one in records if one.result is not None}
    metric = primary_metric(_result(next(iter(runs.values()))))
    key, better = metric.key("global"), 1 if metric.higher_is_better else -1
    lines = []
    for variant in known.variants:
        seeds = [seed for seed in known.seeds if {(variant, seed), (baseline, seed)} <= {*runs}]
        pairs = [(runs[variant, seed], runs[baseline, seed]) for seed in seeds]
        if variant == baseline or len(pairs) < 2:
            continue
        gains = [_result(one)[key] - _result(other)[key] for one, other in pairs]
        lines.append(
            [
                label(study, variant),
                str(len(pairs)),
                f"{fmean(gains):+.3f}",
                f"{_worst([better * gain for gain in gains]) * better:+.3f}",
                *(_share(pairs, of) for of in (_modelled, _steps, _activations, _sent)),
            ]
        )
    heads = (
        *("variant", "seeds", f"{metric.label}, difference", "95 % bound"),
        *("whole run, modelled", "steps", "activations", "bytes sent"),
    )
    return markdown_table(heads, lines)


def _worst(gains: Sequence[float]) -> float:
    """The lower bound of a mean gain."""
    error = stdev(gains) / math.sqrt(len(gains))
    return fmean(gains) - float(student.ppf(CONFIDENCE, len(gains) - 1)) * error


def _share(pairs: Sequence[tuple[RunRecord, RunRecord]], of: Callable[[RunRecord], float]) -> str:
    """A cost as a share of the baseline's: median and range over seeds."""
    shares = [of(one) / of(other) for one, other in pairs]
    return f"{median(shares):.2f} ({min(shares):.2f}–{max(shares):.2f})"


def _result(run: RunRecord) -> Result:
    assert run.result is not None
    return run.result


def _modelled(run: RunRecord) -> float:
    return float(_result(run)["round_modelled_s"])


def _activations(run: RunRecord) -> float:
    return float(_result(run)["activation_bytes_peak"])


def _sent(run: RunRecord) -> float:
    return float(_result(run)["upload_bytes"] + _result(run)["download_bytes"])


def _steps(run: RunRecord) -> float:
    """Local steps of all clients: those that trained the last layer."""
    return float(sum(row["layer_steps"][-1] for row in run.rows))
