"""Tables about differential privacy, and about labels that are read off a head's bias."""

from collections.abc import Sequence

from benchmarks.pages.markdown import bare, markdown_table, spread
from benchmarks.pages.studies import read_compared
from benchmarks.study import read_table, read_values
from droppeft.comparison.study_files import Row, RunRecord


def differential_privacy() -> str:
    """Accuracy, epsilon and noise of each variant."""
    study, records = read_compared("differential_privacy")
    rows = []
    for variant in study.variants:
        runs = [one for one in records if one.variant == variant and one.result is not None]
        if runs:
            rows.append(_variant(variant, runs))
    head = ("variant", "clients", "seeds", "accuracy", "each seed", "epsilon", "noise", "in a mean")
    return markdown_table(head, rows)


def _variant(name: str, runs: Sequence[RunRecord]) -> list[str]:
    results = [one.result for one in runs if one.result is not None]
    accuracies = [result["global_accuracy"] for result in results]
    first, noise = results[0], results[0]["noise_multiplier"]
    private = noise is not None
    return [
        name,
        str(first["clients"]),
        str(len(results)),
        spread(accuracies),
        bare(", ".join(f"{value:.3f}" for value in sorted(accuracies))),
        f"{runs[0].rows[-1]['epsilon']:.2f}" if private else "–",
        f"{noise:.2f}" if private else "–",
        _share(first, noise) if private else "–",
    ]


def _share(result: Row, noise: float) -> str:
    """Standard deviation of the noise in one value of a mean, relative to the clipping norm."""
    return bare(f"{noise / result['cohort_size']:.3f}")


def label_inference() -> str:
    """How often a guess of a client's most frequent label is right."""
    noise = read_values("label_inference")["noise_multipliers"]
    rows = [
        [_where(row["where"], row["epsilon"], noise), _of(row), bare(f"{_right(row):.2f}")]
        for row in read_table("label_inference")
    ]
    return markdown_table(("what the attacker sees", "right", "share"), rows)


def _where(where: str, epsilon: float | None, noise: dict[str, float]) -> str:
    if where == "update":
        return "the update of the client, as the server does, with or without privacy"
    if where != "model":
        return (
            "nothing of the head, as with `sharing.head=personal`: the most frequent label of all"
        )
    if epsilon is None:
        return "the models before and after a round of five clients"
    return f"the same, with epsilon {epsilon:g} (noise {noise[f'{epsilon:g}']:.2f})"


def _of(row: dict[str, float]) -> str:
    return f"{row['right']:,} of {row['guesses']:,}"


def _right(row: dict[str, float]) -> float:
    return row["right"] / row["guesses"]
