"""What Flower costs: a client-round in process, in simulation and in deployment; three places.

    OMP_NUM_THREADS=1 python -m benchmarks.flower_cost.run

Arms alternate (a short run each, then again from the first), so that all run under the same load
of a shared machine. There is one client, so the time of a round less evaluation and saving is the
time of one client-round: instructing, sending, training, validating, merging. The first round of a
run starts processes and loads texts and model; it is reported separately. Each repeat has a seed
of its own, so that nothing of an earlier one is still loaded.

The two arms with "model built per message" follow most of Flower's examples: the
ClientApp builds its model whenever it is called. In simulation the texts stay cached, as a
FederatedDataset in a module's global does; in deployment the process is new and so is everything.

Writes `study.json`. About 15 minutes on 2 cores, nothing else running.
"""

import argparse
import csv
import functools
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.flower_cost import rebuilding_client
from benchmarks.study import about, write_values
from droppeft.config import SourceConfig, load_config
from droppeft.data.sources import load_text
from droppeft.messages.reply import Reply
from droppeft.runs.ledger import RoundRow
from droppeft.runs.read_ledger import read_rows
from droppeft.server.run import start_run
from droppeft.transports.flower import client_app

NAME = "flower_cost"
NODES = 3
SETTINGS = (
    "method=droppeft",
    "threads=1",
    "accelerator=cpu",
    "evaluation.rows=200",
    *("training.precision=fp32", "training.backbone_dropout=true"),  # the defaults when it ran
    "evaluation.personalised=false",  # a client that rebuilds its model only trains
)
ROUNDS = {"places": 4, "client_round": 6}
CLIENT_ROUND = (
    f"rounds={ROUNDS['client_round']}",
    "clients=1",
    "cohort_size=1",
    "evaluation.every=6",
)
PLACES = (f"rounds={ROUNDS['places']}", f"clients={NODES}", f"cohort_size={NODES}")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from flower_on_loopback import Federation, loopback  # noqa: E402

Run = Callable[[Sequence[str], Path], None]


class Silent:
    """A listener that prints nothing."""

    def preparing(self, what: str) -> None: ...
    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None: ...
    def replied(self, reply: Reply) -> None: ...
    def round_done(self, row: RoundRow) -> None: ...
    def finished(self, result: Mapping[str, Any]) -> None: ...


def here(sites: Sequence[Path], words: Sequence[str], out: Path) -> None:
    start_run(load_config(None, [sites_of(sites, words), *words]), out, Silent())


def sites_of(sites: Sequence[Path], words: Sequence[str]) -> str:
    """The setting that names the sites of a run's clients."""
    count = 1 if "clients=1" in words else len(sites)
    return f"sites={','.join(map(str, sites[:count]))}"


def simulated(sites: Sequence[Path], words: Sequence[str], out: Path) -> None:
    here(sites, [*words, "transport=flower"], out)


def simulated_rebuilding(sites: Sequence[Path], words: Sequence[str], out: Path) -> None:
    with clients_that_rebuild():
        simulated(sites, words, out)


def deployed(federation: Federation, words: Sequence[str], out: Path) -> None:
    federation.run(words, out)


def deployed_rebuilding(federation: Federation, words: Sequence[str], out: Path) -> None:
    federation.run([*words, "flower.model_server=false"], out)


def make_sites(folder: Path) -> list[Path]:
    """Give every third of the built-in training texts to a site; return the node files."""
    data, nodes = load_text("builtin", SourceConfig()), []
    for client in range(NODES):
        site = folder / f"client-{client}"
        site.mkdir(parents=True)
        rows = range(client, len(data.train), NODES)
        with (site / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            for row in rows:
                writer.writerow((data.train.texts[row], data.label_names[data.train.labels[row]]))
        nodes.append(site / "node.toml")
        text = f'client = {client}\ndata = "rows.csv"\nthreads = 1\n'
        nodes[-1].write_text(text, encoding="utf-8")
    return nodes


@contextmanager
def clients_that_rebuild() -> Iterator[None]:
    """Replace the simulation's ClientApp by one that builds its model in every call."""
    kept, client_app.app = client_app.app, rebuilding_client.app
    try:
        yield
    finally:
        client_app.app = kept


def client_rounds(arms: Mapping[str, Run], repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds of a client-round and of the local training inside it, per arm."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"client_round_s": [], "training_s": [], "first_s": []} for name in arms
    }
    for repeat in range(repeats):
        for number, (name, run) in enumerate(arms.items()):
            out = folder / f"cost-{repeat}-{number}"
            run([*SETTINGS, *CLIENT_ROUND, f"seed={repeat}"], out)
            rounds = read_rows(out / "rounds.jsonl")
            trainings = [row["total_wall_s"] for row in read_rows(out / "clients.jsonl")]
            whole = [
                row["host_wall_s"] - row["evaluation_wall_s"] - row["saving_wall_s"]
                for row in rounds
            ]
            found[name]["first_s"].append(whole[0])
            found[name]["client_round_s"] += whole[1:]
            found[name]["training_s"] += trainings[1:]
            print(f"{repeat} {name}: {statistics.median(whole[1:]):.2f} s", flush=True)
    return {name: summary(times) for name, times in found.items()}


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    whole = sorted(times["client_round_s"])
    over = [a - b for a, b in zip(times["client_round_s"], times["training_s"], strict=True)]
    return {
        **medians,
        "beside_training_s": statistics.median(over),
        "client_round_quartiles_s": [whole[len(whole) // 4], whole[3 * len(whole) // 4]],
        "client_rounds": len(whole),
    }


def places(arms: Mapping[str, Run], repeats: int, folder: Path) -> dict[str, Any]:
    """One configuration everywhere: hash of the adapter folder, seconds, bytes."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for number, (name, run) in enumerate(arms.items()):
            out = folder / f"place-{repeat}-{number}"
            start = time.perf_counter()
            run([*SETTINGS, *PLACES], out)
            wall_s = time.perf_counter() - start
            result = json.loads((out / "result.json").read_text())
            found[name].append(
                {
                    "command_wall_s": wall_s,
                    "rounds_wall_s": result["host_wall_s"],
                    "adapter_folder_sha256": folder_hash(out / "adapter"),
                    **{
                        key: result[key]
                        for key in (
                            "global_accuracy",
                            "upload_bytes",
                            "download_bytes",
                        )
                    },
                }
            )
            print(f"{repeat} {name}: {wall_s:.1f} s", flush=True)
    digests = {run["adapter_folder_sha256"] for runs in found.values() for run in runs}
    if len(digests) > 1:
        raise SystemExit(f"the places differ: {json.dumps(found, indent=2)}")
    return {name: merged(runs) for name, runs in found.items()}


def merged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last run, with medians of seconds."""
    seconds = {
        key: statistics.median(run[key] for run in runs)
        for key in ("command_wall_s", "rounds_wall_s")
    }
    return {**runs[-1], **seconds, "runs": len(runs)}


def folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sites = make_sites(folder / "sites")
        with loopback(folder / "flower", sites) as federation:
            in_three = {
                "in process": functools.partial(here, sites),
                "simulation": functools.partial(simulated, sites),
                "SuperLink": functools.partial(deployed, federation),
            }
            arms = {
                **in_three,
                "simulation, model built per message": functools.partial(
                    simulated_rebuilding, sites
                ),
                "SuperLink, model built per message": functools.partial(
                    deployed_rebuilding, federation
                ),
            }
            content = {
                **about(NAME),
                "clients": NODES,
                "rounds": ROUNDS,
                "settings": {
                    "all": SETTINGS,
                    "client_round": CLIENT_ROUND,
                    "places": PLACES,
                },
                "places": places(in_three, repeats, folder),
                "client_round": client_rounds(arms, repeats, folder),
            }
    write_values(NAME, content)


if __name__ == "__main__":
    main()
