"""The README with its tables of results, which follow from result files."""

from pathlib import Path

from comparison_sections import read_parts
from studies import runs_of, seeds_of_comparison, shown_settings
from tables import markdown_table, was_compared

from droppeft.comparison.study_files import RunRecord, Study
from droppeft.comparison.summary import Part, VariantRow

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- Written by docs/generate.py from benchmarks: change the source. -->\n"
END = "<!-- End of what is written. -->\n"

CONTESTS = {
    "contest": "The built-in model, six layers",
    "contest_deep": "`deep12`, twelve layers",
    "contest_confirmation": "Six layers again, other seeds, variants suggested by the contest",
}

TEXT = """\
{clients} clients of three kinds, {cohort} a round, Dirichlet alpha {alpha:g} (clients differ in
which classes they have); [data](docs/results.md#data-and-models-of-the-contest) on which no variant
was chosen ([but for what decision 0009 says](docs/decisions/0009-the-contest.md); *all shared* was
prompted by six layers). *Accuracy*: of the global model on 1,000 test texts, with the F1 of class 1
where there are two classes. In brackets: how many times sooner than *{rival}* it reaches the target
on the *modelled clock* (time of work and traffic by the data sheets of devices), or how many seeds
reach it. The *target* is the mean of {rival}'s last three evaluations (500 texts) less a point. It
is reached when the mean of three evaluations reaches it, so a time is known to some rounds.
*Personalised*: clients' own models on their own texts. Activations (measured, of the client that
stores most) and traffic of a run are the largest of the data sets.
"""


def readme_page() -> str:
    """The README as it is, with tables as the result files are."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_results()}\n{END}{after}"


def _results() -> str:
    contests = {name: read_parts(name) for name in CONTESTS if was_compared(name)}
    study, records, _ = next(iter(contests.values()))
    head = TEXT.format(rival=study.baseline, **shown_settings(runs_of(records)))
    return "\n".join([head, *(_table(CONTESTS[name], *found) for name, found in contests.items())])


def _table(title: str, study: Study, records: list[RunRecord], parts: list[Part]) -> str:
    most = len(study.seeds)
    names = [Path(part.data).name for part in parts]
    columns = ["", *names, "personalised", "activations", "upload", "download"]
    two = {one.data for one in records if one.result and one.result["classes"] == 2}
    own = ", ".join(_known(part.own_majority) for part in parts)
    rows = [
        *(_line(parts, most, two, one) for one in study.variants),
        [
            "*TF-IDF, SVM, all texts in one place*",
            *(_known(part.tfidf) for part in parts),
            *("–", "–", "–", "–"),
        ],
        [
            "*the most frequent class (a client's own)*",
            *(_known(part.majority) for part in parts),
            *(own, "–", "–", "–"),
        ],
    ]
    head = (
        f"{title}: {_by_data(records, 'rounds')} rounds, evaluated every "
        f"{_by_data(records, 'evaluation_every')} rounds, {seeds_of_comparison(study, records)}."
    )
    return f"{head}\n\n{markdown_table(columns, rows)}"


def _known(value: float | None) -> str:
    return "–" if value is None else _short(value)


def _by_data(records: list[RunRecord], key: str) -> str:
    """A setting, where it depends on the data with their names."""
    found = {Path(one.data).name: one.result[key] for one in records if one.result is not None}
    if len(set(found.values())) == 1:
        return str(next(iter(found.values())))
    return ", ".join(f"{value} ({name})" for name, value in found.items())


def _line(parts: list[Part], most: int, two: set[str], variant: str) -> list[str]:
    rows = [row for part in parts for row in part.rows if row.variant == variant]
    own = [row.personalised.mean for row in rows if row.personalised]
    peak = max(row.activation_bytes_peak or 0 for row in rows)
    sent = max(row.upload_bytes or 0 for row in rows)
    received = max(row.download_bytes or 0 for row in rows)
    return [
        variant,
        *(
            _reached(row, most, with_f1=part.data in two)
            for part, row in zip(parts, rows, strict=True)
        ),
        ", ".join(_short(mean) for mean in own) or "–",
        f"{peak / 1e6:.0f} MB",
        f"{sent / 1e6:.1f} MB",
        f"{received / 1e6:.1f} MB",
    ]


def _reached(row: VariantRow, most: int, *, with_f1: bool) -> str:
    """Accuracy and speed-up; of how many seeds, where others have more."""
    if row.accuracy is None:
        return "–"
    accuracy = _short(row.accuracy.mean)
    if row.f1 is not None and with_f1:
        accuracy += f", F1 {_short(row.f1.mean)}"
    if row.speed_up_modelled is None:
        return f"{accuracy} ({row.reached} of {row.seeds} seeds)"
    fewer = f", {row.seeds} of {most} seeds" if row.seeds < most else ""
    return f"{accuracy} ({row.speed_up_modelled:.2f} x{fewer})"


def _short(share: float) -> str:
    return f"{share:.3f}".removeprefix("0")
