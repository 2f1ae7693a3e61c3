"""The part of the results that sets `plan` beside `profile`."""

import json

from tables import RESULTS, markdown_table

HEAD = """\
## What was planned, and what it took

`benchmarks/cost_model.py`: memory and time of a step as `droppeft plan` has them (modelled), beside
what fresh processes took (measured). Memory: peak resident of a process that keeps what is in use
and no more, less what it had before the model; what glibc's malloc keeps beyond that by default
stands in the last column. Largest error: {memory}. Time: medians of {trials} trials that take
turns; for each model one speed and one overhead per step are fitted to its cells in fp32, so that
the errors are those of the fit. Largest: {time}. Made on {place}.

![Modelled against measured: memory and time of a step](figures/cost_model.png)
"""
COLUMNS = (
    *("cell", "memory measured", "modelled", "error"),
    *("step measured", "modelled", "error", "kept by malloc (measured)"),
)


def cost_model() -> list[str]:
    """The section, or nothing until the grid was run."""
    path = RESULTS / "cost_model.json"
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    rows, machine = content["cells"], content["machine"]
    timed = [row for row in rows if "time_error" in row]
    head = HEAD.format(
        memory=f"{max(abs(row['memory_error']) for row in rows):.1%}",
        time=f"{max(abs(row['time_error']) for row in timed):.0%}",
        trials=len(rows[0]["trials"]) - 1,
        place=f"{machine['cores']} cores ({machine['processor']}), {machine['threads']} threads",
    )
    lines = [
        [
            row["cell"],
            _megabytes(row["measured_bytes"]),
            _megabytes(row["modelled_bytes"]),
            f"{row['memory_error']:+.1%}",
            f"{row['step_s']:.2f} s",
            f"{row['step_modelled_s']:.2f} s" if row in timed else "–",
            f"{row['time_error']:+.0%}" if row in timed else "–",
            _megabytes(row["kept_by_malloc_bytes"]),
        ]
        for row in rows
    ]
    return [head, markdown_table(COLUMNS, lines)]


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"
