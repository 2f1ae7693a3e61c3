"""Tables of the project's first studies, for the archive page."""

from collections.abc import Callable
from typing import Any

from benchmarks.pages.markdown import bare, markdown_table
from benchmarks.study import read_table, read_values


def first_slice() -> str:
    """FedLoRA and layer dropout side by side: the first run of both."""
    methods = read_table("first_slice")
    one = methods[0]
    lines: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        (f"accuracy, all {one['test_rows']:,} test texts", lambda r: f"{r['global_accuracy']:.3f}"),
        ("TF-IDF + linear SVM, all data in one place", lambda r: f"{r['tfidf_accuracy']:.3f}"),
        (
            f"first round at the target {bare(str(one['target']))}",
            lambda r: str(r["target_round"]),
        ),
        ("… after, this process (measured)", lambda r: f"{r['time_to_target_host_s']:.0f} s"),
        ("… after, side by side (measured)", lambda r: f"{r['time_to_target_measured_s']:.0f} s"),
        ("training steps, all rounds (measured)", lambda r: f"{r['train_wall_s']:.0f} s"),
        ("peak activations (measured)", lambda r: f"{r['activation_bytes_peak'] / 1e6:.0f} MB"),
        ("upload, all clients and rounds", lambda r: f"{r['upload_bytes'] / 1e6:.1f} MB"),
    )
    rows = [[title, *map(show, methods)] for title, show in lines]
    return markdown_table(("", *(row["variant"] for row in methods)), rows)


def head_learning_rate() -> str:
    """Centralised training with one learning rate, and with one for the head."""
    summary = read_values("head_learning_rate")["summary"]
    steps = [str(cell["steps"]) for cell in next(iter(summary.values()))]
    rows = [
        [name, *(f"{cell['mean']:.3f} ± {cell['sd']:.3f}" for cell in cells)]
        for name, cells in summary.items()
    ]
    return markdown_table(("accuracy after … steps of 16 texts", *steps), rows)
