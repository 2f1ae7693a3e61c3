"""The answer of a comparison, in sentences for terminal, page and Markdown. Ours.

One variant is compared with the baseline: with a target the one that reaches it first, otherwise
the one with the best quality. Of the others it says which reach the target.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from droppeft.comparison.summary import Part, Spread, VariantRow, spread_text
from droppeft.quantities import bytes_text, seconds_text
from droppeft.tasks.metrics import CHRF, ROUGE_L, Metric

SAME = 0.05
"""Times and costs whose ratio differs from 1 by no more than this are called about the same."""

MARGIN = 0.01
"""A gain of clients' own models that is smaller than this is not mentioned."""

MOST_NAMES = 4
"""Most variants that a sentence lists; more are counted."""


@dataclass(frozen=True)
class Clock:
    """The times of one clock in a variant's row.

    Attributes:
        name: ``modelled`` or ``measured``.
        to_target, speed_up, whole_run: as the row has them.
    """

    name: str
    to_target: Callable[[VariantRow], Spread | None]
    speed_up: Callable[[VariantRow], float | None]
    whole_run: Callable[[VariantRow], float | None]


MODELLED = Clock(
    "modelled",
    lambda row: row.time_to_target_modelled_s,
    lambda row: row.speed_up_modelled,
    lambda row: row.round_modelled_s,
)
MEASURED = Clock(
    "measured",
    lambda row: row.time_to_target_measured_s,
    lambda row: row.speed_up_measured,
    lambda row: row.round_measured_s,
)


def clock_of(part: Part) -> Clock:
    """The modelled clock if it knows every variant with a result, else the measured one."""
    known = [row.round_modelled_s is not None for row in part.rows if row.seeds]
    return MODELLED if all(known) else MEASURED


def answer(part: Part) -> list[str]:
    """Return what a comparison has shown on one data set and model, most important first.

    Reasons of failures are not among the sentences: see
    :func:`~droppeft.comparison.writers.failures`.
    """
    done = [row for row in part.rows if row.seeds]
    if not done:
        return ["No run has a result."]
    clock = clock_of(part)
    others = [row for row in done if row.variant != part.baseline]
    if not others:
        found = _alone(part, clock, done[0])
    elif len(others) == len(done):
        lacking = f"There is no result of {quoted(part.baseline)} to compare with."
        found = [lacking, *_alone(part, clock, _subject(part, clock, others))]
    else:
        [base] = [row for row in done if row.variant == part.baseline]
        found = _compared(part, clock, base, others)
    return [*found, *_incomplete(part), *_one_seed(done)]


def quoted(variant: str) -> str:
    """A variant's name as sentences have it: in quotes if it is more than one word."""
    return variant if re.fullmatch(r"[A-Za-z][\w.+-]*", variant) else f'"{variant}"'


def _compared(
    part: Part, clock: Clock, base: VariantRow, others: Sequence[VariantRow]
) -> list[str]:
    """Sentences about one of the others beside the baseline, and about the target in the rest."""
    subject = _subject(part, clock, others)
    target = _target(part, clock, base, subject)
    rest = [row for row in others if row is not subject] if clock.to_target(subject) else []
    found = (
        target,
        _rest(part, clock, rest),
        (_quality if target else _best_quality)(part, base, subject),
        _texts(part, base, subject),
        _own_models(part, base, subject),
        _costs(clock, base, subject),
    )
    return [sentence for sentence in found if sentence]


def _subject(part: Part, clock: Clock, rows: Sequence[VariantRow]) -> VariantRow:
    """The variant that reaches the target first, on all its seeds; else that of best quality."""
    times = [(time.mean, row) for row in rows if (time := clock.to_target(row))]
    if times:
        return min(times, key=lambda pair: pair[0])[1]
    return max(rows, key=lambda row: _worth(part.metric, row))


def _worth(metric: Metric, row: VariantRow) -> tuple[int, float]:
    """What variants are ordered by: the global model, or clients' own models if there is none."""
    if row.quality:
        return 2, metric.gain(row.quality.mean, 0.0)
    return (1, metric.gain(row.personalised.mean, 0.0)) if row.personalised else (0, 0.0)


def _alone(part: Part, clock: Clock, row: VariantRow) -> list[str]:
    """Sentences about a variant with nothing to compare it with."""
    name, value = quoted(row.variant), row.quality or row.personalised
    found = []
    if part.target is not None and row.reached is not None:
        reaches = f"reaches {_goal(part)} {_when(clock, row)}".rstrip()
        found.append(f"{name} {reaches if row.reached else f'does not reach {_goal(part)}'}.")
    if value:
        whose = "" if row.quality else ", mean of clients' own models"
        found.append(f"{name}: {part.metric.label} {spread_text(part.metric, value)}{whose}.")
    return found


def _goal(part: Part) -> str:
    metric = part.target_metric
    return f"the target ({metric.label} {metric.text(part.target)})"


def _when(clock: Clock, row: VariantRow) -> str:
    """When and on how many seeds the target is reached."""
    return ", ".join(part for part in (_after(clock, row), _on_seeds(row)) if part)


def _after(clock: Clock, row: VariantRow) -> str:
    time = clock.to_target(row)
    return f"after {seconds_text(time.mean)} ({clock.name})" if time else ""


def _on_seeds(row: VariantRow) -> str:
    """On how many seeds the target is reached; nothing if there is one seed."""
    return f"on {row.reached} of {row.seeds} seeds" if row.seeds > 1 else ""


def _target(part: Part, clock: Clock, base: VariantRow, subject: VariantRow) -> str | None:
    """Which of the two reaches the target, and how much sooner; ``None`` without a target."""
    if part.target is None or (base.reached is None and subject.reached is None):
        return None
    name, other, goal = quoted(subject.variant), quoted(base.variant), _goal(part)
    every = " on every seed" if base.seeds > 1 else ""
    ratio = clock.speed_up(subject)
    if ratio is not None:
        on = f"({clock.name}){', ' if subject.seeds > 1 else ''}{_on_seeds(subject)}."
        if ratio < 1 - SAME:
            return f"{other} reaches {goal} first; {name} takes {_times(1 / ratio)} as long {on}"
        how = f"{_times(ratio)} sooner than" if ratio > 1 + SAME else "about as soon as"
        return f"{name} reaches {goal} {how} {other} {on}"
    if clock.to_target(subject):
        reaches = f"reaches it {_on_seeds(base)}" if base.reached else "does not reach it"
        return f"{name} reaches {goal} {_when(clock, subject)}; {other} {reaches}."
    if clock.to_target(base):
        return f"Only {other} reaches {goal}{every}, {_after(clock, base)}."
    return f"No variant reaches {goal}{every}."


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:.0f} times"


def _rest(part: Part, clock: Clock, rest: Sequence[VariantRow]) -> str | None:
    """Which further variants reach the target sooner than the baseline, and which do not."""
    aimed = [row for row in rest if row.reached is not None]
    sooner = [quoted(row.variant) for row in aimed if (clock.speed_up(row) or 0) > 1 + SAME]
    late = [
        f"{quoted(row.variant)}{f' ({row.reached} of {row.seeds} seeds)' if row.seeds > 1 else ''}"
        for row in aimed
        if (row.reached or 0) < row.seeds
    ]
    found = []
    if sooner:
        found.append(f"Also sooner than {quoted(part.baseline)}: {_listed(sooner)}.")
    if late:
        every = " on every seed" if max(row.seeds for row in aimed) > 1 else ""
        found.append(f"Not reached{every} by {_listed(late)}.")
    return " ".join(found) or None


def _listed(names: Sequence[str]) -> str:
    """Names as a list, or their number if there are many."""
    return f"{len(names)} variants" if len(names) > MOST_NAMES else _and(names)


def _and(parts: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _quality(part: Part, base: VariantRow, subject: VariantRow) -> str | None:
    """The quality of both."""
    metric = part.metric
    known = [row for row in (subject, base) if row.quality]
    if not known:
        return None
    values = [f"{quoted(row.variant)} {spread_text(metric, row.quality)}" for row in known]
    return f"{metric.label.capitalize()}: {', '.join(values)}{_better(metric, known)}."


def _best_quality(part: Part, base: VariantRow, subject: VariantRow) -> str | None:
    """Which of the two has the better quality; the first sentence of an answer without a target."""
    metric = part.metric
    if subject.quality is None or base.quality is None:
        return _quality(part, base, subject)
    both = sorted((base, subject), key=lambda row: _worth(metric, row), reverse=True)
    names = [quoted(row.variant) for row in both]
    value, other = (spread_text(metric, row.quality) for row in both)
    if value == other:
        return f"{_and(names)} have the same {metric.label}, {value}{_better(metric, both)}."
    word = "high" if metric.higher_is_better else "low"
    word += "est" if sum(row.quality is not None for row in part.rows) > 2 else "er"
    return (
        f"{names[0]} has the {word} {metric.label}, {value}; {names[1]} has {other}"
        f"{_better(metric, both)}."
    )


def _better(metric: Metric, rows: Sequence[VariantRow]) -> str:
    """On how many common seeds the first of two variants is better; nothing for one seed."""
    if len(rows) < 2:
        return ""
    first, second = rows
    gains = [
        metric.gain(own, other)
        for seed, own in first.quality_by_seed.items()
        if own is not None and (other := second.quality_by_seed.get(seed)) is not None
    ]
    if len(gains) < 2:
        return ""
    better = sum(gain > 0 for gain in gains)
    return f" ({quoted(first.variant)} is better on {better} of {len(gains)} seeds)"


def _texts(part: Part, base: VariantRow, subject: VariantRow) -> str | None:
    """The scores of the texts that the models write."""
    both = {ROUGE_L: (subject.rouge_l, base.rouge_l), CHRF: (subject.chrf, base.chrf)}
    for metric, (own, other) in both.items():
        if own and other:
            values = (
                f"{quoted(subject.variant)} {spread_text(metric, own)}, "
                f"{quoted(base.variant)} {spread_text(metric, other)}"
            )
            before = part.untrained.get(metric.label)
            without = f", the model before training {metric.text(before)}" if before else ""
            return f"{metric.label} of the texts that they write: {values}{without}."
    return None


def _own_models(part: Part, base: VariantRow, subject: VariantRow) -> str | None:
    """Whose clients have the best own models, if the sentence about quality does not say it."""
    known = [row for row in part.rows if row.personalised]
    if len(known) < 2:
        return None

    def own(row: VariantRow) -> float:
        return part.metric.gain(row.personalised.mean, 0.0) if row.personalised else 0.0

    best = max(known, key=own)
    globally = max((subject, base), key=lambda row: _worth(part.metric, row))
    if (
        subject.quality
        and base.quality
        and globally in known
        and own(best) - own(globally) < MARGIN
    ):
        return None
    shown = {row.variant: row for row in (best, subject, base) if row.personalised}
    values = [
        f"{quoted(name)} {spread_text(part.metric, row.personalised)}"
        for name, row in shown.items()
    ]
    label = part.metric.label.capitalize()
    return f"{label} of clients' own models on their own texts: {', '.join(values)}."


def _costs(clock: Clock, base: VariantRow, subject: VariantRow) -> str | None:
    """Memory and traffic as shares of the baseline's; the time, unless a target has said it."""
    measured: dict[str, Callable[[VariantRow], float | None]] = {
        "memory for activations": lambda row: row.activation_bytes_peak,
        "traffic": traffic,
    }
    needs = []
    if clock.speed_up(subject) is None:
        times = clock.whole_run(subject), clock.whole_run(base)
        needs.append(_need("time for the whole run", *times, seconds_text, clock.name))
    for what, value in measured.items():
        needs.append(_need(what, value(subject), value(base), bytes_text, "measured"))
    known = [need for need in needs if need]
    if not known:
        return None
    return f"Compared with {quoted(base.variant)}, {quoted(subject.variant)} needs {_and(known)}."


def traffic(row: VariantRow) -> float | None:
    """Bytes that travelled in a whole run, up and down, mean over seeds."""
    if row.upload_bytes is None or row.download_bytes is None:
        return None
    return row.upload_bytes + row.download_bytes


def _need(
    what: str, own: float | None, other: float | None, text: Callable[[float], str], how: str
) -> str | None:
    """What is needed, as a share of the baseline's; ``None`` if one of the two is unknown."""
    if own is None or not other:
        return None
    if not own:
        return f"no {what}"
    ratio, amount = own / other, f"({text(own)}, {how})"
    if abs(ratio - 1) <= SAME:
        return f"about the same {what} {amount}"
    share = f"{ratio:.0%} of" if ratio < 2 else _times(ratio)
    return f"{share} the {what} {amount}"


def _incomplete(part: Part) -> list[str]:
    """Which variants have fewer results than others."""
    most = max(row.seeds for row in part.rows)
    fewer = [row for row in part.rows if row.seeds < most and row.failures]
    if not fewer:
        return []
    if most == 1:
        return [f"Without a result: {_listed([quoted(row.variant) for row in fewer])}."]
    names = [f"{quoted(row.variant)} ({row.seeds} of {most} seeds)" for row in fewer]
    return [f"Without a result on every seed: {_listed(names)}."]


def _one_seed(done: Sequence[VariantRow]) -> list[str]:
    if len(done) < 2 or max(row.seeds for row in done) > 1:
        return []
    return ["This is one seed: with another one the order may differ."]
