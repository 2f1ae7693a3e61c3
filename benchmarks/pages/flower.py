"""Tables of what Flower costs: one configuration in three places, and a client's round."""

from benchmarks.pages.markdown import markdown_table
from benchmarks.study import read_values

TRAFFIC = {
    "upload_bytes": "bytes up",
    "download_bytes": "bytes down",
    "upload_framed_bytes": "framed up",
    "download_framed_bytes": "framed down",
}


def flower_places() -> str:
    """The same run in process, in a simulation, and behind a SuperLink."""
    rows = [
        (
            name,
            f"`{place['adapter_folder_sha256'][:16]}`",
            f"{place['rounds_wall_s']:.0f} s",
            f"{place['command_wall_s']:.0f} s",
            *("–" if place[key] is None else f"{place[key]:,}" for key in TRAFFIC),
        )
        for name, place in read_values("flower_cost")["places"].items()
    ]
    return markdown_table(("", "adapter", "rounds", "command", *TRAFFIC.values()), rows)


def flower_client_round() -> str:
    """What a client's round takes, and what of it is not training."""
    rows = [
        (
            name,
            f"{cost['client_round_s']:.2f} s ({low:.2f}–{high:.2f})",
            f"{cost['training_s']:.2f} s",
            f"{cost['beside_training_s']:.2f} s",
            f"{cost['first_s']:.1f} s",
        )
        for name, cost in read_values("flower_cost")["client_round"].items()
        for low, high in [cost["client_round_quartiles_s"]]
    ]
    columns = (
        *("", "client's round (quartiles)", "training", "beside the training", "first round"),
    )
    return markdown_table(columns, rows)
