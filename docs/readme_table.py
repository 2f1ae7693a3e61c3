"""The README with its table of results, which follows from a result file."""

from pathlib import Path

from studies import runs_of, seeds_of
from tables import RESULTS, markdown_table

from droppeft.comparison.summary import MemberRow, Part, summary
from droppeft.report.page import read_folder

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- Written by docs/generate.py from benchmarks/results: change the source. -->\n"
END = "<!-- End of what is written. -->\n"

SOURCES = {
    "contest": "Data on which nothing was chosen",
    "many_devices": "Development data: members were chosen on it",
}
"""The first of these that was run."""

TEXT = """\
{about}. The built-in model,
{devices} devices of three kinds, {cohort} a round, {rounds} rounds, Dirichlet alpha {alpha:g},
{seeds}. Accuracy is the global model's; in brackets how much sooner than `fedlora`, on the modelled
clock, it reaches what `fedlora` ends with less a point, or how many seeds do. Activations are
measured, upload is counted on the wire.

"""


def readme_page() -> str:
    """The README as it is, with a table as the result file is."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_results()}\n{END}{after}"


def _results() -> str:
    name = next(name for name in SOURCES if (RESULTS / name / "comparison.json").is_file())
    _, comparison, played = read_folder(RESULTS / name)
    parts = summary(comparison, played)
    config = played[0].cell.config
    head = TEXT.format(
        about=SOURCES[name],
        devices=config.devices,
        cohort=config.cohort,
        rounds=config.rounds,
        alpha=config.partition.alpha,
        seeds=seeds_of(runs_of(played)),
    )
    columns = ["", *(Path(part.data).name for part in parts), "activations", "upload"]
    return head + markdown_table(columns, [_line(parts, name) for name in comparison.members])


def _line(parts: list[Part], member: str) -> list[str]:
    rows = [row for part in parts for row in part.rows if row.member == member]
    peak = max(row.activation_bytes_peak or 0 for row in rows)
    sent = max(row.upload_bytes or 0 for row in rows)
    return [member, *map(_reached, rows), f"{peak / 1e6:.0f} MB", f"{sent / 1e6:.1f} MB"]


def _reached(row: MemberRow) -> str:
    if row.accuracy is None:
        return "–"
    accuracy = f"{row.accuracy.mean:.3f}".lstrip("0")
    if row.speed_up_modelled is None:
        return f"{accuracy} ({row.reached} of {row.seeds} seeds)"
    return f"{accuracy} ({row.speed_up_modelled:.2f} x)"
