"""Keep some of the texts that the models of the study write, for its page.

    python -m benchmarks.language_models.samples runs/compare-language_models

The first texts of seed 0 on each data set, by the model before training and after training with
each variant, go to the table `samples`. They are those of `result.json`, none is chosen.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.study import write_table

SEED = 0


def texts(folder: Path) -> list[dict[str, str]]:
    """A row per prompt of each data set, with what each variant writes."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for file in sorted(folder.glob(f"*-seed{SEED}-*/result.json")):
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        data = Path(result["data"]).name
        for sample in result["generated"]["samples"]:
            row = found.setdefault(
                (data, sample["prompt"]),
                {
                    "data": data,
                    **{name: sample[name] for name in ("prompt", "reference", "before")},
                },
            )
            row[result["config"]["method"]] = sample["after"]
    return list(found.values())


if __name__ == "__main__":
    write_table("language_models", "samples", texts(Path(sys.argv[1])))
