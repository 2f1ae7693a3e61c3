"""Table of what a run over a SuperLink survives."""

from statistics import median

from benchmarks.pages.markdown import markdown_table
from benchmarks.study import read_values


def kills() -> str:
    """For each killed process and phase: kills that changed nothing, and the time of the round."""
    found = read_values("faults")["kills"]
    phases = list(dict.fromkeys(kill["phase"] for kill in found))
    rows = []
    for target in dict.fromkeys(kill["target"] for kill in found):
        cells = []
        for phase in phases:
            of_cell = [one for one in found if (one["target"], one["phase"]) == (target, phase)]
            same = sum(one["same_round"] for one in of_cell)
            seconds = median(one["seconds"] for one in of_cell)
            cells.append(f"{same} of {len(of_cell)}, {seconds:.0f} s")
        rows.append((target, *cells))
    return markdown_table(("killed", *phases), rows)
