"""What a dropped layer saves and what its gate costs: against sliced models and other ways.

    OMP_NUM_THREADS=1 python -m benchmarks.layer_dropout_cost.run
    python -m benchmarks.layer_dropout_cost.run --only sliced --device cuda

There are three parts, on architectures with random weights and LoRA (rank 8) in all layers:

- `sliced`: a full training step with exact gates against the same step of a model that has only
  the layers that run, made of the same weights. Every round draws gates anew for each rate; rates
  and the two steps of a pair are in random order.
- `peaks`: most layers active, and most bytes stored for backward, in 50 steps: exact gates against
  independent ones.
- `peers`: against other ways to drop layers (`peers.py`), on an OPT model. torchtune
  takes part if it can be imported: pip install --no-deps torchtune==0.6.1 torchao==0.17.0
  omegaconf tiktoken.

The learning rate is 0: a step does all its work, and the next starts from the same weights, so
that the two losses of a pair must be equal bit for bit; how many are is part of the result. On
CUDA base weights are bf16 and the forward runs under autocast.

Every shape is written as it finishes, beside what is there: to the table of its part, to
`sliced_pairs` and `peers_pairs` (a row per pair of steps), and to `study.json`, which has a command
and a machine for each. About 15 minutes on 2 cores, nothing else running; `make results` draws it.
"""

import argparse
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
import torch
from scipy.stats import binom

from benchmarks.layer_dropout_cost.peers import (
    RATE,
    Active,
    Slicer,
    Way,
    active_in_step,
    alone_way,
    behaviour,
    default_gates,
    gated_way,
    layerdrop_way,
    looped_way,
    multiplied_way,
    plain_way,
    shell,
    torchtune_way,
)
from benchmarks.layer_dropout_cost.steps import (
    SEED,
    Bench,
    Side,
    build,
    columns,
    interval,
    measure_pair,
    part_of,
    stored_bytes,
    warm_optimizer,
)
from benchmarks.study import (
    SCHEMA_VERSION,
    about,
    read_table,
    read_values,
    was_measured,
    write_table,
    write_values,
)
from droppeft import seeds
from droppeft.layer_dropout import layer_rates, protected_ends

NAME = "layer_dropout_cost"
RATES = (0.0, 0.25, 0.5, 0.75)
SHAPES = {
    "cpu": ("bert-large:1x64", "llama-1b:1x32"),
    "cuda": ("bert-large:32x128", "llama-1b:8x512", "llama-7b:4x512"),
}
PEAK_SHAPE, PEAK_STEPS, PEAK_RUNS = "bert-large:1x16", 50, 1000
PEER_SHAPE = "opt-125m:8x16"
PEERS = ("torchtune", "torchao")

Found = dict[str, list[dict[str, Any]]]
"""Rows by table."""

Ways = dict[str, tuple[Way, torch.optim.Optimizer]]


def measure_sliced(bench: Bench, pairs: int) -> tuple[dict[str, Any], Found]:
    """A gated step against the sliced model's, per rate."""
    slicer, optimizer = Slicer(bench.model), warm_optimizer(bench.model, bench)
    raw: dict[float, list[dict[str, Any]]] = {rate: [] for rate in RATES}
    with gated_way(bench.model) as ours:
        for round in range(pairs):
            rng = seeds.python_generator(SEED, purpose="order", step=round)
            coins = partial(torch.manual_seed, round)  # of the dropout inside of BERT's blocks
            for rate in rng.sample(RATES, len(RATES)):
                active = default_gates(bench.num_layers, rate, round)
                less = slicer.with_layers(active)
                gated = partial(ours.forward, bench.batch, active)
                alone = partial(less, **bench.batch)
                sides = {
                    "gated": Side(coins, gated, bench.model, optimizer),
                    "sliced": Side(coins, alone, less, part_of(optimizer, less)),
                }
                pair = measure_pair(sides, bench, round, rng)
                raw[rate].append({"active_layers": sum(active), **pair})
            print(f"sliced: {round + 1} of {pairs} rounds", flush=True)
    by_rate = {rate: columns(found) for rate, found in raw.items()}
    rows = [{"rate": rate, **compared(found, by_rate[0.0])} for rate, found in by_rate.items()]
    return {}, {"sliced": rows, "sliced_pairs": numbered("rate", raw)}


def numbered(key: str, raw: Mapping[Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Pairs as rows of a table."""
    return [
        {key: name, "pair": number, **pair}
        for name, pairs in raw.items()
        for number, pair in enumerate(pairs)
    ]


def compared(found: Mapping[str, list[Any]], full: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Against the sliced model, pair by pair, and against the plain full one, round by round."""
    on_cuda = {}
    if "gated_device_bytes" in found:
        most = max(found["gated_device_bytes"]), max(full["sliced_device_bytes"])
        on_cuda = {"device_bytes_to_full": most[0] / most[1]}
    return {
        "active_layers": found["active_layers"][0],
        **interval("wall_to_sliced", found["gated_wall_s"], found["sliced_wall_s"]),
        **interval("cpu_to_sliced", found["gated_cpu_s"], found["sliced_cpu_s"]),
        **interval("wall_to_full", found["gated_wall_s"], full["sliced_wall_s"]),
        "bytes_to_full": mean(found["gated_bytes"]) / mean(full["sliced_bytes"]),
        "same_bytes": found["gated_bytes"] == found["sliced_bytes"],
        "same_losses": sum(found["same_loss"]),
        **on_cuda,
    }


def measure_peaks(bench: Bench) -> tuple[dict[str, Any], Found]:
    """Bytes of 50 forwards per sampling, and the most active layers of 50 draws, many times."""
    layers, ends = bench.num_layers, protected_ends(bench.num_layers, 1, 1)
    rates = layer_rates(0.5, "uniform", layers, protected=ends)
    with gated_way(bench.model) as ours:

        def stored(active: Active) -> int:
            return stored_bytes(bench.model, partial(ours.forward, bench.batch, active), bench)

        full, least = stored((True,) * layers), stored(tuple(i in ends for i in range(layers)))
        layer = (full - least) // (layers - len(ends))
        none = full - layers * layer
        samplings, rows = {}, []
        for sampling in ("exact", "bernoulli"):
            runs = [drawn(rates, sampling, run) for run in range(PEAK_RUNS)]
            counts = [sum(active) for active in runs[0]]
            found = [stored(active) for active in runs[0]]
            peaks = [max(map(sum, run)) for run in runs]
            rows += [
                {"sampling": sampling, "step": step, "active_layers": count, "stored_bytes": size}
                for step, (count, size) in enumerate(zip(counts, found, strict=True))
            ]
            samplings[sampling] = {
                "bytes_follow_count": found == [none + count * layer for count in counts],
                "peak_share_of_blocks": (max(found) - none) / (full - none),
                "peak_share": max(found) / full,
                "peak_active": {"mean": mean(peaks), "least": min(peaks), "most": max(peaks)},
            }
    droppable = layers - len(ends)
    expected = len(ends) + expected_peak(PEAK_STEPS, droppable, 1 - layers * 0.5 / droppable)
    about_it = {
        "steps": PEAK_STEPS,
        "runs": PEAK_RUNS,
        "bytes_full": full,
        "bytes_layer": layer,
        "expected_peak_active": {"exact": layers * 0.5, "bernoulli": expected},
        "samplings": samplings,
    }
    return about_it, {"peaks": rows}


def drawn(rates: Sequence[float], sampling: str, seed: int) -> list[Active]:
    """Gates of a run's first steps."""
    return [
        active_in_step(step, rates, {"sampling": sampling, "seed": seed})
        for step in range(PEAK_STEPS)
    ]


def expected_peak(draws: int, trials: int, probability: float) -> float:
    """Expected maximum of independent binomial counts: sum over x of P(maximum > x)."""
    below = binom.cdf(np.arange(trials), trials, probability)
    return float(np.sum(1 - below**draws))


def measure_peers(bench: Bench, pairs: int) -> tuple[dict[str, Any], Found]:
    """Every other way against ours, at the same gates where it has gates for the whole batch."""
    plain, slicer = shell(bench.model), Slicer(bench.model)
    optimizer = warm_optimizer(bench.model, bench)
    found: dict[str, Any] = {}
    with ExitStack() as contexts:
        ours = contexts.enter_context(gated_way(bench.model))
        ways = other_ways(plain, optimizer, bench, contexts)
        try:
            ways["torchtune"] = (torchtune_way(shell(plain)), optimizer)
        except ImportError as error:
            found["torchtune"] = {"not_run": " ".join(str(error).split())}
        raw = against_ours(ours, optimizer, ways, bench, pairs)
        for name, (way, _) in {"gated": (ours, optimizer), **ways}.items():
            found[name] = compared_to_ours(columns(raw[name])) if name in raw else {}
            if name != "none":
                found[name] |= behaviour(way, plain, slicer, bench.batch)
    rows = [{"variant": name, **row} for name, row in found.items()]
    return {"rate": RATE}, {"peers": rows, "peers_pairs": numbered("variant", raw)}


def other_ways(
    plain: Any, optimizer: torch.optim.Optimizer, bench: Bench, contexts: ExitStack
) -> Ways:
    """The ways that need no other package; all but `layerdrop` share one set of weights."""
    rows, tokens = bench.batch["input_ids"].shape
    alone = shell(plain)
    hooked = warm_optimizer(alone, bench)
    own = build(f"opt-125m-layerdrop:{rows}x{tokens}", bench.device).model
    return {
        "layer_dropout": (contexts.enter_context(alone_way(alone, hooked)), hooked),
        "if": (looped_way(shell(plain)), optimizer),
        "layerdrop": (layerdrop_way(own), warm_optimizer(own, bench)),
        "multiplied": (multiplied_way(shell(plain)), optimizer),
        "none": (plain_way(plain), optimizer),
    }


def against_ours(
    ours: Way, optimizer: torch.optim.Optimizer, ways: Ways, bench: Bench, pairs: int
) -> dict[str, list[dict[str, Any]]]:
    """Pairs of every way's step and ours."""
    raw: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for round in range(pairs):
        rng = seeds.python_generator(SEED, purpose="order", step=round)
        for name in rng.sample(list(ways), len(ways)):
            way, its_optimizer = ways[name]
            active = way.draw(round) or ours.draw(round)
            theirs = partial(way.forward, bench.batch, active)
            same = partial(ours.forward, bench.batch, active)
            sides = {
                "theirs": Side(partial(way.draw, round), theirs, way.model, its_optimizer),
                "ours": Side(lambda: None, same, ours.model, optimizer),
            }
            pair = measure_pair(sides, bench, round, rng)
            ran = mean(way.ran()) if way.ran else mean(active)
            raw[name].append({"ran": ran, **pair})
        print(f"peers: {round + 1} of {pairs} rounds", flush=True)
    return raw


def compared_to_ours(found: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Pair by pair; bytes over all that were measured."""
    return {
        **interval("wall_to_ours", found["theirs_wall_s"], found["ours_wall_s"]),
        **interval("cpu_to_ours", found["theirs_cpu_s"], found["ours_cpu_s"]),
        "bytes_to_ours": sum(found["theirs_bytes"]) / sum(found["ours_bytes"]),
        "ran_least": min(found["ran"]),
        "ran_most": max(found["ran"]),
        "same_losses": sum(found["same_loss"]),
    }


PARTS: dict[str, Callable[[Bench, int], tuple[dict[str, Any], Found]]] = {
    "sliced": measure_sliced,
    "peaks": lambda bench, pairs: measure_peaks(bench),
    "peers": measure_peers,
}


DEFAULT_PARTS = {"cpu": tuple(PARTS), "cuda": ("sliced",)}


def measure(part: str, shape: str, device: torch.device, pairs: int) -> None:
    """Measure one shape and put it beside those that are there."""
    start = time.perf_counter()
    bench = build(shape, device)
    found, tables = PARTS[part](bench, pairs)
    came_from = about(NAME, accelerator=device.type)
    versions = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    name, _, size = shape.partition(":")
    accelerator = came_from["machine"]["accelerator"]
    entry = {
        **came_from,
        "versions": came_from["versions"]
        | {name: versions[name] for name in PEERS if name in versions},
        "part": part,
        "model": name,
        "size": size,
        "accelerator": accelerator,
        "num_layers": bench.num_layers,
        "pairs": pairs,
        "seed": SEED,
        "wall_s": time.perf_counter() - start,
        **found,
    }
    write(entry, tables)
    print(f"{part} {shape}: {entry['wall_s']:.0f} s", flush=True)


def write(entry: Mapping[str, Any], tables: Found) -> None:
    """Replace what is there of the same part, model and accelerator."""
    place = {key: entry[key] for key in ("model", "accelerator")}

    def other(row: Mapping[str, Any]) -> bool:
        return any(row[key] != value for key, value in place.items())

    known = read_values(NAME)["measured"] if was_measured(NAME) else []
    there = any(one["part"] == entry["part"] for one in known)
    for table, rows in tables.items():
        before = filter(other, read_table(NAME, table)) if there else ()
        write_table(NAME, table, [*before, *({**place, **row} for row in rows)])
    others = [one for one in known if one["part"] != entry["part"] or other(one)]
    write_values(NAME, {"schema_version": SCHEMA_VERSION, "measured": [*others, entry]})


def main() -> None:
    """Measure the parts asked for, and write each as it finishes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part; CUDA has `sliced` alone")
    parser.add_argument(
        "--pairs", type=int, default=30, help="of every rate and of every other way"
    )
    parser.add_argument("--shapes", nargs="+", help="of `sliced`: ARCHITECTURE:BATCHxTOKENS")
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    shapes = {
        "sliced": arguments.shapes or SHAPES[arguments.device],
        "peaks": (PEAK_SHAPE,),
        "peers": (PEER_SHAPE,),
    }
    chosen = [arguments.only] if arguments.only else DEFAULT_PARTS[arguments.device]
    for part in chosen:
        for shape in shapes[part]:
            measure(part, shape, device, arguments.pairs)


if __name__ == "__main__":
    main()
