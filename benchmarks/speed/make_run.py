"""The whole of `make run`, before issue 28 and now.

    python -m benchmarks.speed.make_run [--before FOLDER]

`droppeft run`, as `make run` calls it once everything is installed, with the code of commit a103eab
and with that of this folder, alternately. The older code is checked out as a git worktree in
`build/before`, unless a folder that has it is given. Both use this environment's packages.

The accuracy is that of the final model on all test texts.

Writes the table `make_run`. About seven minutes on two cores, nothing else running.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed.measuring import Arm, alternate, arguments, middle, write_part
from benchmarks.speed.processes import EVERY_CORE, run_command

PART = "make_run"
COMMIT = "a103eab"
ROOT = Path(__file__).resolve().parents[2]
BEFORE, AFTER = f"before (commit {COMMIT})", "now"


def checked_out(folder: Path) -> Path:
    """Make a worktree of the older commit, unless it is there."""
    if not (folder / "src").is_dir():
        words = ["git", "worktree", "add", "--detach", str(folder), COMMIT]
        subprocess.run(words, cwd=ROOT, check=True)
    return folder


def runs_in(root: Path, words: list[str]) -> Arm:
    """`droppeft run` with the code of a checkout."""

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, "-m", "droppeft", "run", *words, "--out", str(out)]
            variables = {**EVERY_CORE, "PYTHONPATH": str(root / "src")}
            took = run_command(command, environment=variables, folder=Path(folder))
            result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        return {
            "wall_s": took.wall_s,
            "cpu_s": took.cpu_s,
            "peak_bytes": took.peak_bytes,
            "accuracy": result["global_accuracy"],
        }

    return run


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--before", type=Path, default=ROOT / "build/before")
    parser.add_argument("words", nargs="*", help="settings of both runs")
    chosen = parser.parse_args()
    before = checked_out(chosen.before)
    arms = {BEFORE: runs_in(before, chosen.words), AFTER: runs_in(ROOT, chosen.words)}
    rows = alternate(arms, chosen.repeats, warm_up=False)
    for arm in arms:
        print(f"{arm}: {middle(rows, arm, 'wall_s'):.0f} s, {middle(rows, arm, 'accuracy'):.3f}")
    write_part(PART, {"before": COMMIT, "words": chosen.words}, rows)


if __name__ == "__main__":
    main()
