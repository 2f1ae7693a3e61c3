"""What clients of a contest get by always answering their own most frequent class.

    python -m benchmarks.own_majority.run      # two minutes; needs DROPPEFT_DATA

A run reports this itself (`own_majority_accuracy` in `result.json`), but the runs of the contests
do not have it. It follows from data, split and seed alone. Writes `study.json`.
"""

from pathlib import Path

from benchmarks.study import about, write_values
from droppeft.comparison.grid import cells, read_comparison
from droppeft.data.partition import partition_rows
from droppeft.data.reference import own_majority_accuracy
from droppeft.data.sources import load_text

NAME = "own_majority"
FOLDER = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("contest", "contest_deep", "contest_others", "contest_confirmation")


def main() -> None:
    """Compute every split once, and write what is found by experiment, data and seed."""
    content: dict[str, dict[str, dict[str, float]]] = {}
    known: dict[tuple[str, int], float] = {}
    for name in EXPERIMENTS:
        for cell in cells(read_comparison(FOLDER / name / "study.toml")):
            config = cell.config
            place = (config.data, config.seed)
            if place not in known:
                data = load_text(config.data, config.source, config.partition.key)
                labels, keys = data.train.labels, data.train.keys
                clients = partition_rows(
                    labels, keys, config.clients, config.partition, config.seed
                )
                known[place] = own_majority_accuracy(data, clients)
                print(f"{Path(config.data).name}, seed {config.seed}: {known[place]:.3f}")
            by_seed = content.setdefault(name, {}).setdefault(Path(config.data).name, {})
            by_seed[str(config.seed)] = known[place]
    write_values(NAME, {**about(NAME), "accuracies": content})


if __name__ == "__main__":
    main()
