"""Whether torch.compile pays under layer dropout, on a CPU: block by block, and a whole model.

    OMP_NUM_THREADS=1 python -m benchmarks.compile_blocks.run

Three models with LoRA (rank 8) on all linear modules, a third of the layers dropped in every step.
A step is a forward and a backward. The arms take the same steps alternately, with the same gates,
so that all run under the same load of a shared machine. Before that each arm is run alone, with an
empty cache: the seconds of its first steps (which are compiling), its graphs after all patterns of
dropped layers that occurred, and those that texts of other lengths add. If its gradients are not
the plain model's, if other blocks run, or if torch gives up on a function, the script stops.

A step is measured in wall seconds and in processor seconds, which depend less on other work on the
machine.

Writes the tables `result` and `repeats` and `study.json`. About 10 minutes on a core of its own.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from transformers import AutoConfig, AutoModelForSequenceClassification

from benchmarks.layer_dropout_cost.steps import interval
from benchmarks.study import about, write_table, write_values
from droppeft.adapters.attach import attach
from droppeft.config import AdapterConfig
from droppeft.federated_method import adapter_spec
from droppeft.layer_dropout import DrawnGates, find_blocks, layer_dropout
from droppeft.models.loading import load_backbone

NAME = "compile_blocks"
ROWS, TOKENS, VOCABULARY = 8, 64, 1000
MEAN = 1 / 3
WARM_STEPS = 6
TOLERANCE = 1e-4
"""Between elements of gradients, as a share of the largest one."""

SHAPES: dict[str, dict[str, Any]] = {
    "BERT": {"model_type": "bert", "num_attention_heads": 8, "intermediate_size": 1024},
    "Llama": {"model_type": "llama", "num_attention_heads": 4, "intermediate_size": 688},
}
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "pad_token_id": 0,
    "use_cache": False,
}

Batch = dict[str, torch.Tensor]


class Arm(NamedTuple):
    """A model in training, what to call, and its gates."""

    model: nn.Module
    run: Callable[..., Any]
    dropout: DrawnGates


def plain(model: nn.Module) -> Callable[..., Any]:
    return model


def by_block(model: nn.Module) -> Callable[..., Any]:
    for block in find_blocks(model)[1]:
        vars(block)["forward"] = torch.compile(block.forward)
    return model


def whole(model: nn.Module) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(model)
    return compiled


WAYS = {"not compiled": plain, "block by block": by_block, "whole model": whole}


def shaped(name: str) -> nn.Module:
    """Random weights, always the same; no module dropout, whose draws a compiler changes."""
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "built-in":
            model = load_backbone("builtin", ("one", "other"), 0).model
        else:
            config = AutoConfig.for_model(**COMMON, **SHAPES[name], **silent)
            model = AutoModelForSequenceClassification.from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    path, blocks = find_blocks(model)
    spec = adapter_spec(AdapterConfig(targets=("all-linear",)), len(blocks))
    return attach(model, spec, path, 0).train()


def texts(tokens: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (ROWS, tokens), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.arange(ROWS) % 2,
    }


@contextmanager
def arms(name: str, ways: Sequence[str]) -> Iterator[dict[str, Arm]]:
    """The same model for each of the ways, under layer dropout; nothing is compiled yet."""
    torch._dynamo.reset()
    with ExitStack() as stack:
        made = {}
        for way in ways:
            model = shaped(name)
            run = WAYS[way](model)
            made[way] = Arm(model, run, stack.enter_context(layer_dropout(model, None, MEAN)))
        yield made


def step(arm: Arm, number: int, tokens: int = TOKENS) -> tuple[float, float]:
    """Seconds of the clock and of the processor that a forward and a backward take."""
    arm.dropout.step = number
    arm.model.zero_grad()
    batch = texts(tokens, number)
    start = time.perf_counter(), time.process_time()
    arm.run(**batch).loss.backward()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def check_counts(found: Mapping[str, Arm]) -> None:
    counts = {way: arm.dropout.executed for way, arm in found.items()}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"not the same blocks ran: {counts}")


def difference(arm: Arm, other: Arm) -> float:
    """The largest between two elements of gradients, as a share of the largest element."""
    ours, theirs = (
        [value.grad for value in one.model.parameters() if value.requires_grad]
        for one in (arm, other)
    )
    if [one is None for one in ours] != [one is None for one in theirs]:
        raise SystemExit("not the same layers have gradients")
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    largest = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def compiling(name: str, way: str, rounds: int) -> dict[str, Any]:
    """Compile an arm alone: its graphs, the seconds for them, and whether its results are right.

    Giving up on a function after too many graphs of it is an error here.
    """
    with (
        arms(name, ("not compiled", way)) as found,
        fresh_cache(),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        counters.clear()
        first_s, worst = 0.0, 0.0
        for number in range(rounds):
            wall_s = step(found[way], number)[0]
            first_s += wall_s if number < WARM_STEPS else 0.0
            step(found["not compiled"], number)
            worst = max(worst, difference(found[way], found["not compiled"]))
            check_counts(found)
        if worst > TOLERANCE:
            raise SystemExit(f"{way}: gradients differ by {worst:.1e} of the largest")
        made = graphs()
        for number in range(rounds):
            step(found[way], number, tokens=TOKENS // 2 + number)
        print(f"{name}, {way}: {first_s:.0f} s, {made} graphs, then {graphs() - made}", flush=True)
        return {
            "first_steps_wall_s": first_s,
            "graphs": made,
            "graphs_of_other_lengths": graphs() - made,
            "gradients_differ_by": worst,
        }


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def timed(name: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of steps that the arms take alternately, after everything is compiled."""
    raw: dict[str, dict[str, list[float]]] = {way: {"wall_s": [], "cpu_s": []} for way in WAYS}
    with arms(name, tuple(WAYS)) as found, fresh_cache():
        for number in range(WARM_STEPS + rounds):
            for way, arm in found.items():
                wall_s, cpu_s = step(arm, number)
                if number >= WARM_STEPS:
                    raw[way]["wall_s"].append(wall_s)
                    raw[way]["cpu_s"].append(cpu_s)
            check_counts(found)
    return raw


def measure(name: str, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the tables `result` and `repeats`."""
    made = {way: compiling(name, way, rounds) for way in WAYS if way != "not compiled"}
    raw = timed(name, rounds)
    result = [
        {
            "model": name,
            "variant": way,
            **compared(seconds, raw["not compiled"]),
            **made.get(way, {}),
        }
        for way, seconds in raw.items()
    ]
    repeats = [
        {"model": name, "variant": way, "step": number, "wall_s": wall_s, "cpu_s": cpu_s}
        for way, seconds in raw.items()
        for number, (wall_s, cpu_s) in enumerate(zip(*seconds.values(), strict=True))
    ]
    return result, repeats


def compared(seconds: Mapping[str, list[float]], base: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians, and their ratios to the model that is not compiled."""
    return {
        "step_wall_s": median(seconds["wall_s"]),
        "step_cpu_s": median(seconds["cpu_s"]),
        **interval("wall_to_not_compiled", seconds["wall_s"], base["wall_s"]),
        **interval("cpu_to_not_compiled", seconds["cpu_s"], base["cpu_s"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    result, repeats = [], []
    for name in ("built-in", *SHAPES):
        print(name, flush=True)
        summary, raw = measure(name, rounds)
        result += summary
        repeats += raw
    settings = {
        "rows": ROWS,
        "tokens": TOKENS,
        "mean": MEAN,
        "rounds": rounds,
        "shapes": {**SHAPES, "all": COMMON},
    }
    write_values(NAME, {**about(NAME), "settings": settings})
    write_table(NAME, "result", result)
    write_table(NAME, "repeats", repeats)


if __name__ == "__main__":
    main()
