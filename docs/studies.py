"""What the sections about studies of several variants and seeds have in common."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from droppeft.comparison.study_files import Row, RunRecord, Study

Seeds = Mapping[int, RunRecord]
"""Runs of a variant by seed."""

Runs = Mapping[str, Seeds]
"""Finished runs by variant and seed."""


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


def shown_settings(runs: Runs) -> dict[str, Any]:
    """What a section's head says of the first of its runs, and their seeds."""
    known = outcome_of(next(iter(next(iter(runs.values())).values())))
    names = {"cohort": "cohort_size", "steps": "local_steps", "batch": "batch_size"}
    columns = {name: name for name in ("clients", "rounds", "alpha")} | names
    return {"seeds": seeds_of(runs), **{name: known[key] for name, key in columns.items()}}


def seeds_of(runs: Runs) -> str:
    """How many seeds variants have, and whether that is all there will be."""
    counts = sorted({len(own) for own in runs.values()})
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} seeds, **not finished**"
    return f"{counts[0]} seeds" if counts[0] > 1 else "one seed, **not finished**"


def seeds_of_comparison(study: Study, records: Sequence[RunRecord]) -> str:
    """How many seeds each variant has on each of its data, and whether that is all it asks for."""
    done = Counter((one.place, one.variant) for one in records if one.result is not None)
    wanted = len(study.seeds)
    least, most = min(done.values()), max(done.values())
    if least < wanted:
        return f"{least} to {most} seeds, **not finished**"
    return f"{wanted} seeds" if wanted > 1 else "one seed"


def spread(values: Collection[float | None]) -> str:
    """Mean and standard deviation of those there are."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {stdev(known):.3f}" if len(known) > 1 else ""
    return bare(f"{fmean(known):.3f}{deviation}")


def bare(text: str) -> str:
    """Numbers below one without their 0."""
    return re.sub(r"(?<![0-9])0\.(?=[0-9])", ".", text)
