"""The README with its tables of results, which follow from result files."""

from pathlib import Path

from comparison_sections import read_parts
from studies import runs_of, seeds_of
from tables import markdown_table, was_compared

from droppeft.comparison.cells import Comparison
from droppeft.comparison.playing import Played
from droppeft.comparison.summary import MemberRow, Part

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- Written by docs/generate.py from benchmarks/results: change the source. -->\n"
END = "<!-- End of what is written. -->\n"

CONTESTS = {"contest": "The built-in model, six layers", "contest_deep": "`deep12`, twelve layers"}

TEXT = """\
{devices} devices of three kinds, {cohort} a round, Dirichlet alpha {alpha:g}; data on which no
member was chosen ([but for what decision 0009 says](docs/decisions/0009-the-contest.md)).
*Accuracy*: of the global model on 1,000 test texts. In brackets: how many times sooner than
*{rival}* it reaches the target on the modelled clock, or how many seeds do. The *target* is the
mean of {rival}'s last three evaluations (500 texts) less a point; reached is what the mean of three
evaluations reaches. *Personalised*: devices' own models on their own texts. Activations (measured,
of the device that stores most) and traffic of a run are the largest of the data sets.
"""


def readme_page() -> str:
    """The README as it is, with tables as the result files are."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_results()}\n{END}{after}"


def _results() -> str:
    contests = {name: read_parts(name) for name in CONTESTS if was_compared(name)}
    comparison, played, _ = next(iter(contests.values()))
    config = played[0].cell.config
    head = TEXT.format(
        devices=config.devices,
        cohort=config.cohort,
        alpha=config.partition.alpha,
        rival=comparison.baseline,
    )
    return "\n".join([head, *(_table(CONTESTS[name], *found) for name, found in contests.items())])


def _table(title: str, comparison: Comparison, played: list[Played], parts: list[Part]) -> str:
    most = len(comparison.seeds)
    names = [Path(part.data).name for part in parts]
    columns = ["", *names, "personalised", "activations", "upload", "download"]
    own = ", ".join(_known(part.own_majority) for part in parts)
    rows = [
        *(_line(parts, most, one) for one in comparison.members),
        [
            "*TF-IDF, SVM, all texts in one place*",
            *(_known(part.tfidf) for part in parts),
            *("–", "–", "–", "–"),
        ],
        [
            "*the most frequent class (a device's own)*",
            *(_known(part.majority) for part in parts),
            *(own, "–", "–", "–"),
        ],
    ]
    head = f"{title}: {_rounds(played)} rounds, {seeds_of(runs_of(played))}."
    return f"{head}\n\n{markdown_table(columns, rows)}"


def _known(value: float | None) -> str:
    return "–" if value is None else _short(value)


def _rounds(played: list[Played]) -> str:
    """How many there are, where it depends on the data with their names."""
    found = {Path(one.cell.data).name: one.cell.config.rounds for one in played}
    if len(set(found.values())) == 1:
        return str(played[0].cell.config.rounds)
    return ", ".join(f"{rounds} ({name})" for name, rounds in found.items())


def _line(parts: list[Part], most: int, member: str) -> list[str]:
    rows = [row for part in parts for row in part.rows if row.member == member]
    own = [row.personalised.mean for row in rows if row.personalised]
    peak = max(row.activation_bytes_peak or 0 for row in rows)
    sent = max(row.upload_bytes or 0 for row in rows)
    received = max(row.download_bytes or 0 for row in rows)
    return [
        member,
        *(_reached(row, most) for row in rows),
        ", ".join(_short(mean) for mean in own) or "–",
        f"{peak / 1e6:.0f} MB",
        f"{sent / 1e6:.1f} MB",
        f"{received / 1e6:.1f} MB",
    ]


def _reached(row: MemberRow, most: int) -> str:
    """Accuracy and speed-up; of how many seeds, where others have more."""
    if row.accuracy is None:
        return "–"
    if row.speed_up_modelled is None:
        return f"{_short(row.accuracy.mean)} ({row.reached} of {row.seeds} seeds)"
    fewer = f", {row.seeds} of {most} seeds" if row.seeds < most else ""
    return f"{_short(row.accuracy.mean)} ({row.speed_up_modelled:.2f} x{fewer})"


def _short(share: float) -> str:
    return f"{share:.3f}".removeprefix("0")
