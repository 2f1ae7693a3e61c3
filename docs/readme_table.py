"""The README with its table of results, which follows from a result file."""

from collections.abc import Iterator
from pathlib import Path

from studies import runs_of, seeds_of
from tables import RESULTS, markdown_table, was_compared

from droppeft.comparison.cells import Comparison
from droppeft.comparison.playing import Played
from droppeft.comparison.summary import MemberRow, Part, summary
from droppeft.report.page import read_folder

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- Written by docs/generate.py from benchmarks/results: change the source. -->\n"
END = "<!-- End of what is written. -->\n"

SOURCES = {
    "contest": "Data on which nothing was chosen",
    "ablation": "The method's parts, on development data (20 Newsgroups): they were chosen on it",
}
"""The first of these of which all runs are there."""

TEXT = """\
{about}. The built-in model,
{devices} devices of three kinds, {cohort} a round, {rounds} rounds, Dirichlet alpha {alpha:g},
{seeds}. Accuracy is the global model's; in brackets how much sooner than *{rival}*, on the modelled
clock, it reaches what that ends with less a point, or how many seeds do. Personalised: devices' own
models on their own texts. Activations are measured, upload is what the tensors sent take.

"""


def readme_page() -> str:
    """The README as it is, with a table as the result file is."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_results()}\n{END}{after}"


def _results() -> str:
    name, comparison, played = next(filter(_is_whole, _found()))
    parts = summary(comparison, played)
    config = played[0].cell.config
    assert comparison.target is not None
    rival = str(comparison.target.member)
    head = TEXT.format(
        about=SOURCES[name],
        devices=config.devices,
        cohort=config.cohort,
        rounds=_rounds(played),
        alpha=config.partition.alpha,
        seeds=seeds_of(runs_of(played)),
        rival=rival,
    )
    names = [Path(part.data).name for part in parts]
    columns = ["", *names, "personalised", "activations", "upload"]
    return head + markdown_table(columns, [_line(parts, rival, one) for one in comparison.members])


def _rounds(played: list[Played]) -> str:
    """How many there are, where it depends on the data with their names."""
    found = {Path(one.cell.data).name: one.cell.config.rounds for one in played}
    if len(set(found.values())) == 1:
        return str(played[0].cell.config.rounds)
    return ", ".join(f"{rounds} ({name})" for name, rounds in found.items())


def _found() -> Iterator[tuple[str, Comparison, list[Played]]]:
    for name in SOURCES:
        if was_compared(name):
            _, comparison, played = read_folder(RESULTS / name)
            yield name, comparison, played


def _is_whole(found: tuple[str, Comparison, list[Played]]) -> bool:
    _, comparison, played = found
    places = max(1, len(comparison.data)) * max(1, len(comparison.models))
    return len(played) == len(comparison.members) * len(comparison.seeds) * places


def _line(parts: list[Part], rival: str, member: str) -> list[str]:
    rows = [row for part in parts for row in part.rows if row.member == member]
    rivals = [row for part in parts for row in part.rows if row.member == rival]
    own = [row.personalised.mean for row in rows if row.personalised]
    peak = max(row.activation_bytes_peak or 0 for row in rows)
    sent = max(row.upload_bytes or 0 for row in rows)
    return [
        member,
        *map(_reached, rows, rivals),
        ", ".join(_short(mean) for mean in own) or "–",
        f"{peak / 1e6:.0f} MB",
        f"{sent / 1e6:.1f} MB",
    ]


def _reached(row: MemberRow, rival: MemberRow) -> str:
    if row.accuracy is None:
        return "–"
    own, other = row.time_to_target_modelled_s, rival.time_to_target_modelled_s
    if own is None or other is None:
        return f"{_short(row.accuracy.mean)} ({row.reached} of {row.seeds} seeds)"
    return f"{_short(row.accuracy.mean)} ({other.mean / own.mean:.2f} x)"


def _short(share: float) -> str:
    return f"{share:.3f}".removeprefix("0")
