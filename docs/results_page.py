"""The page of results: what the committed result files say."""

import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from comparison_sections import comparison_sections, synthetic_sections
from cost_sections import cost_sections
from dropout_statements import statement_sections
from personal_section import personal_sections
from policies_section import policies_sections
from tables import NOTICE, markdown_table, place, read_table, read_values

RESULTS_HEAD = """\
# Results

Every number here comes from a file in [`benchmarks`](../benchmarks), made by the study or the
script named with it. *Measured* means with a real clock on the machine named; what is modelled is
marked as such. [findings.md](findings.md) says what follows from the numbers.
"""

FIRST_SLICE_HEAD = """\
## AG News over {clients} clients

`benchmarks/first_slice`: the {layers}-layer built-in model, {cohort} clients per round, {rounds}
rounds of {steps} steps, Dirichlet alpha {alpha}, one seed. `fedlora` runs all layers, `droppeft`
drops exactly 2 in every step. The two alternate round by round on one machine: {place}.

![Accuracy against wall time of both methods](figures/first_slice.png)
"""

HEAD_RATE_HEAD = """\
## A learning rate for the head

`benchmarks/head_learning_rate`: centralised training of the built-in model on the built-in data,
full depth, {seeds} seeds; mean and standard deviation of the accuracy on its test texts. Made on
{place}.
"""

FLOWER_HEAD = """\
## One configuration in three places

`benchmarks/flower_cost`: the built-in model and data, {nodes} clients, all of them in each of
{rounds} rounds; the SuperLink and its {nodes} SuperNodes are on loopback. All measured, medians of
{runs} alternating runs, on {place}.
The hash is over all files of `adapter/`: it is the same everywhere, or the script stops.
"""

FLOWER_COST_HEAD = """\
### What a client-round costs

One client, {rounds} rounds of 10 steps of 16 texts; {runs} alternating runs per arm. A
client-round is a round less evaluation and saving; "beside the training" is what is not spent in
setting values, training and packing on the client. "Model built per message" is the pattern of
most of Flower's examples: the ClientApp builds its model whenever it is called. In a simulation
the process stays, and the texts with it. On a SuperNode every message has a new process, which
loads everything. The built-in model is small (22 M parameters); the cost of building grows with
the model.
"""


LAYER_DROPOUT_HEAD = """\
## What dropping layers saves, and what a gate costs

`benchmarks/layer_dropout_cost`: training steps (forward, backward, AdamW) of models with random
weights and LoRA of rank 8 in all layers; exact gates, first and last layer never dropped.
Measured, on {place}.

![Cost of gates, savings, and stored bytes of 50 steps](figures/layer_dropout_cost.png)

### Against a model that has only these layers

The *sliced* model is made of the same weights, with the list of blocks cut to those that run. Both
take the same step, one right after the other, in random order, with new gates for every pair.
Medians of the pairs' ratios with bootstrap 95 % intervals; within 3 % is *yes* if the upper end of
the interval of seconds is, *no* if the lower end is not, else *open*. Blocks that ran were counted
in every step. Stored is what autograd saves for the backward, parameters excluded.
"""

LAYER_DROPOUT_PEAKS_HEAD = """\
### The worst of {steps} steps

{model}, mean rate .5: the most layers that ran in any of {steps} steps, mean of {runs:,} runs,
beside what is expected of binomial draws; and the bytes that the forwards of one run stored.
"""

LAYER_DROPOUT_PEERS_HEAD = """\
### Other ways to drop layers

An OPT model of {layers} layers, rate .5, {pairs} pairs of steps each. *Ours* in the head of the
columns is `gated`, as in `droppeft run`. Both steps of a pair have the same gates, but for
torchtune, which draws for every row of a batch, and the model without dropout. transformers'
`layerdrop` and torchtune have independent gates without protected ends; the loop and the
multiplication use our gates. What each does with a dropped layer was tested with a batch of one
row. `gated` applies its gates in evaluation mode too, so leave it before evaluating;
`layer_dropout` opens all gates in evaluation mode by itself.
"""


COMPILE_HEAD = """\
## torch.compile under layer dropout

`benchmarks/compile_blocks`: forward and backward with LoRA of rank 8 in all layers, batches of
{rows} texts of {tokens} tokens, a third of the layers dropped in every step, gates changing.
*Block by block*: `block.forward = torch.compile(block.forward)`, as in the README; *whole model*:
`torch.compile(model)`, which compiles what lies between gates. Times of {rounds} steps that the
three take alternately, relative to not compiling: medians of the ratios with bootstrap 95 %
intervals. Graphs are all that were compiled, first for every pattern of dropped layers that
occurred, then for {rounds} more lengths of texts. All measured, on {place}.
Other work ran there as well: processor seconds vary less than wall seconds, and compiling would be
faster on an idle machine.
"""


QUALITY_HEAD = """\
## What dropping layers costs in accuracy

`benchmarks/layer_dropout_quality`: one client, QQP, LoRA of rank 8, batches of 16, constant
learning rate after {warm_up} steps; accuracy on {rows:,} rows cut from the training part
(development data), at full depth. *Equal steps*: after {budget} steps. *Equal work*: after as many
steps as cost what {budget} steps at full depth cost, counted as tokens times layers that ran. In
brackets the mean difference to full depth with the same seeds. The reference is a third of the
layers dropped, exact counts, uniform, first and last layer never dropped. A single seed says
little: another seed changes a cell by {noise:.3f} (standard deviation over the seeds of a cell,
median of the cells). *Frozen* rows have LoRA only in the layers above the frozen ones; they ran at
equal steps and without a cache, which would save more time ([below](#frozen-first-layers)). What
follows from all this is in [findings.md](findings.md).
"""


def results_page() -> str:
    """What the committed result files say."""
    groups: dict[str, list[str]] = {
        "Methods side by side": comparison_sections(),
        "Layers that stay on clients": personal_sections(),
        "Rates that tune themselves": [*synthetic_sections(), *policies_sections()],
        "Layer dropout": [*statement_sections(), _quality(), _layer_dropout(), _compile_blocks()],
        "Time and memory": cost_sections(),
        "First steps": [_first_slice(), _head_learning_rate(), _flower()],
    }
    contents = [
        f"- **{group}**: {', '.join(_link(section) for section in sections)}"
        for group, sections in groups.items()
    ]
    found = [section for sections in groups.values() for section in sections]
    return "\n".join([f"{NOTICE}\n", RESULTS_HEAD, *contents, "", *found])


def _link(section: str) -> str:
    """Title of a section, and where GitHub puts it."""
    title = section.partition("\n")[0].removeprefix("## ")
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return f"[{title}](#{anchor})"


def _first_slice() -> str:
    content = read_values("first_slice")
    methods = read_table("first_slice")
    one = methods[0]
    target = f"{one['target']:.2f}".removeprefix("0")
    lines: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        (f"accuracy, all {one['test_rows']:,} test texts", lambda r: f"{r['global_accuracy']:.3f}"),
        ("TF-IDF + linear SVM, all data in one place", lambda r: f"{r['tfidf_accuracy']:.3f}"),
        (f"first round at the target {target}", lambda r: str(r["target_round"])),
        ("… after, this process (measured)", lambda r: _seconds(r["time_to_target_host_s"])),
        ("… after, side by side (measured)", lambda r: _seconds(r["time_to_target_measured_s"])),
        ("training steps, all rounds (measured)", lambda r: _seconds(r["train_wall_s"])),
        (f"mean active layers of {one['num_layers']}", lambda r: f"{r['mean_active_layers']:.2f}"),
        ("peak activations (measured)", lambda r: f"{r['activation_bytes_peak'] / 1e6:.0f} MB"),
        ("upload, all clients and rounds", lambda r: f"{r['upload_bytes'] / 1e6:.1f} MB"),
        ("wall time outside training steps and evaluation", lambda r: f"{r['overhead']:.1%}"),
    )
    rows = [[title, *map(show, methods)] for title, show in lines]
    head = FIRST_SLICE_HEAD.format(
        layers=one["num_layers"],
        cohort=content["cohort_size"],
        clients=content["clients"],
        rounds=content["rounds"],
        steps=content["local_steps"],
        alpha=content["alpha"],
        place=place(content["machine"]),
    )
    return head + "\n" + markdown_table(("", *(row["variant"] for row in methods)), rows)


def _head_learning_rate() -> str:
    content = read_values("head_learning_rate")
    steps = [str(cell["steps"]) for cell in next(iter(content["summary"].values()))]
    rows = [
        [name, *(f"{cell['mean']:.3f} ± {cell['sd']:.3f}" for cell in cells)]
        for name, cells in content["summary"].items()
    ]
    head = HEAD_RATE_HEAD.format(seeds=len(content["seeds"]), place=place(content["machine"]))
    return head + "\n" + markdown_table(("accuracy after … steps of 16 texts", *steps), rows)


def _flower() -> str:
    content = read_values("flower_cost")
    places = [
        [
            name,
            f"`{place['adapter_folder_sha256'][:16]}`",
            f"{place['rounds_wall_s']:.0f} s",
            f"{place['command_wall_s']:.0f} s",
            *(_bytes(place[key]) for key in TRAFFIC),
        ]
        for name, place in content["places"].items()
    ]
    costs = [
        [
            name,
            f"{cost['client_round_s']:.2f} s ({low:.2f}–{high:.2f})",
            f"{cost['training_s']:.2f} s",
            f"{cost['beside_training_s']:.2f} s",
            f"{cost['first_s']:.1f} s",
        ]
        for name, cost in content["client_round"].items()
        for low, high in [cost["client_round_quartiles_s"]]
    ]
    runs = next(iter(content["places"].values()))["runs"]
    head = FLOWER_HEAD.format(
        nodes=content["clients"],
        rounds=content["rounds"]["places"],
        runs=runs,
        place=place(content["machine"]),
    )
    costs_head = FLOWER_COST_HEAD.format(rounds=content["rounds"]["client_round"], runs=runs)
    places_columns = ("", "adapter", "rounds", "command", *TRAFFIC.values())
    costs_columns = (
        "",
        "client-round (quartiles)",
        "training",
        "beside the training",
        "first round",
    )
    return "\n".join(
        [
            head,
            markdown_table(places_columns, places),
            costs_head,
            markdown_table(costs_columns, costs),
        ]
    )


def _layer_dropout() -> str:
    measured = read_values("layer_dropout_cost")["measured"]
    sliced = {(one["model"], one["accelerator"]): one for one in _of_part(measured, "sliced")}
    [peaks], [peers] = _of_part(measured, "peaks"), _of_part(measured, "peers")
    rows = read_table("layer_dropout_cost", "sliced")
    cells = [_sliced_row(sliced[row["model"], row["accelerator"]], row) for row in rows]
    on_cpu = [one for one in sliced.values() if one["accelerator"] == "none"]
    peaks_head = LAYER_DROPOUT_PEAKS_HEAD.format(
        model=peaks["model"], steps=peaks["steps"], runs=peaks["runs"]
    )
    return "\n".join(
        [
            LAYER_DROPOUT_HEAD.format(place=place(on_cpu[0]["machine"])),
            markdown_table(SLICED_COLUMNS, cells),
            "All rates at which something is dropped together, clock time and CPU time: "
            + "; ".join(map(_together, on_cpu))
            + ".\n",
            peaks_head,
            markdown_table(PEAKS_COLUMNS, _peaks_rows(peaks)),
            LAYER_DROPOUT_PEERS_HEAD.format(layers=peers["num_layers"], pairs=peers["pairs"]),
            markdown_table(PEERS_COLUMNS, _peers_rows(peers["num_layers"])),
        ]
    )


def _of_part(measured: Sequence[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [one for one in measured if one["part"] == part]


SLICED_COLUMNS = (
    "model, batch",
    "rate",
    "layers",
    "pairs",
    "time / sliced",
    "CPU time / sliced",
    "within 3 %",
    "stored bytes = sliced",
    "losses = sliced",
    "time / full depth",
    "stored / full depth",
)


def _together(entry: dict[str, Any]) -> str:
    """The median ratio of a gated step to a sliced model's over the pairs of all rates."""
    pairs = [
        row
        for row in read_table("layer_dropout_cost", "sliced_pairs")
        if all(row[key] == entry[key] for key in ("model", "accelerator")) and row["rate"] > 0
    ]
    found = []
    for kind in ("wall_s", "cpu_s"):
        ratios = np.array([row[f"gated_{kind}"] / row[f"sliced_{kind}"] for row in pairs])
        again = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
        low, high = np.quantile(np.median(again, axis=1), [0.025, 0.975])
        found.append(f"{np.median(ratios):.3f} ({low:.3f}–{high:.3f})")
    return f"{entry['model']} {' and '.join(found)}, {len(pairs)} pairs"


def _sliced_row(entry: dict[str, Any], row: dict[str, Any]) -> Sequence[str]:
    accelerator = row["accelerator"]
    return (
        f"{row['model']}, {entry['size']}" + ("" if accelerator == "none" else f", {accelerator}"),
        str(float(row["rate"])),
        f"{row['active_layers']} of {entry['num_layers']}",
        str(entry["pairs"]),
        _ratio(row, "wall_to_sliced"),
        _ratio(row, "cpu_to_sliced"),
        _within(row, entry["pairs"]),
        _yes(row["same_bytes"]),
        f"{row['same_losses']} of {entry['pairs']}",
        _ratio(row, "wall_to_full"),
        f"{row['bytes_to_full']:.3f}",
    )


PEAKS_COLUMNS = (
    "gates",
    "most layers, mean (range)",
    "… expected",
    "most bytes / full depth",
    "… of the blocks' bytes",
    "bytes follow the count",
)


def _peaks_rows(entry: dict[str, Any]) -> list[Sequence[str]]:
    return [
        (
            sampling,
            f"{peak['mean']:.2f} ({peak['least']}–{peak['most']}) of {entry['num_layers']}",
            f"{entry['expected_peak_active'][sampling]:.2f}",
            f"{found['peak_share']:.1%}",
            f"{found['peak_share_of_blocks']:.1%}",
            _yes(found["bytes_follow_count"]),
        )
        for sampling, found in entry["samplings"].items()
        for peak in [found["peak_active"]]
    ]


PEERS_COLUMNS = (
    "",
    "time / ours",
    "CPU time / ours",
    "stored / ours",
    "share of layers that ran",
    "output = sliced model's",
    "a dropped layer's gradient",
    "AdamW moves it",
    "full depth after `eval()`",
    "same gradients when checkpointed",
    "parameter names kept",
    "hidden states returned",
)
PEERS = {
    "gated": "droppeft, `gated`",
    "layer_dropout": "droppeft, `layer_dropout`",
    "if": "an `if` in a loop written for this model",
    "layerdrop": "transformers, `layerdrop`",
    "torchtune": "torchtune, `prepare_layer_dropout`",
    "multiplied": "multiplied by 0 or 1 (stochastic depth)",
    "none": "no dropout",
}


def _peers_rows(layers: int) -> list[Sequence[str]]:
    rows = {row["variant"]: row for row in read_table("layer_dropout_cost", "peers")}
    return [_peer_row(title, rows[name], layers) for name, title in PEERS.items()]


def _peer_row(title: str, row: dict[str, Any], layers: int) -> Sequence[str]:
    if row.get("not_run"):
        return (title, f"not run: {row['not_run']}", *[""] * (len(PEERS_COLUMNS) - 2))
    return (title, *_peer_costs(row), *_peer_behaviour(row, layers))


def _peer_costs(row: dict[str, Any]) -> Sequence[str]:
    if row["wall_to_ours"] is None:  # ours itself
        return ("1", "1", "1", "–")
    return (
        _ratio(row, "wall_to_ours"),
        _ratio(row, "cpu_to_ours"),
        f"{row['bytes_to_ours']:.3f}",
        f"{row['ran_least']:.2f}–{row['ran_most']:.2f}",
    )


def _peer_behaviour(row: dict[str, Any], layers: int) -> Sequence[str]:
    if row["equals_sliced"] is None:  # without dropout there is nothing to look at
        return ("–",) * 7
    states = row["hidden_states"]
    return (
        _yes(row["equals_sliced"]),
        row["dropped_gradient"],
        _yes(row["dropped_moves"]),
        _yes(row["evaluates_in_full"]),
        _yes(row["checkpoints"]),
        _yes(row["names_kept"]),
        "–" if states is None else "all" if states == layers + 1 else "of layers that ran",
    )


QUALITY_COLUMNS = (
    "condition",
    "seeds",
    "accuracy, equal steps",
    "accuracy, equal work",
    "CPU time of the steps / full depth",
    "peak stored / full depth",
)


def _quality() -> str:
    """Per model a table of conditions, with what has been run so far."""
    content = read_values("layer_dropout_quality")
    cells: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in read_table("layer_dropout_quality"):
        seeds = cells.setdefault((row["model"], row["condition"]), {})
        seeds.setdefault(row["seed"], {})[row["budget"]] = row
    head = QUALITY_HEAD.format(
        warm_up=content["warm_up_steps"],
        budget=content["budget_steps"],
        rows=content["development_rows"],
        noise=_noise(cells),
    )
    parts = [head]
    for model in dict.fromkeys(model for model, _ in cells):
        rows = [
            _quality_row(condition, found, cells[model, "full depth"])
            for (owner, condition), found in cells.items()
            if owner == model
        ]
        parts += [f"### {model}\n", markdown_table(QUALITY_COLUMNS, rows)]
    return "\n".join(parts)


def _quality_row(
    condition: str, found: dict[int, dict[str, Any]], full: dict[int, dict[str, Any]]
) -> Sequence[str]:
    shared = sorted(found.keys() & full.keys())
    return (
        condition,
        str(len(found)),
        _accuracy("steps", found, full),
        _accuracy("work", found, full),
        _share("train_cpu_s", found, full, shared),
        _share("activation_bytes_peak", found, full, shared),
    )


def _accuracy(end: str, found: dict[int, dict[str, Any]], full: dict[int, dict[str, Any]]) -> str:
    values = [measured[end]["accuracy"] for measured in found.values() if end in measured]
    if not values:
        return "–"
    shared = [seed for seed in found if seed in full and end in found[seed]]
    gaps = [found[seed][end]["accuracy"] - full[seed]["steps"]["accuracy"] for seed in shared]
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread} ({mean(gaps):+.3f})"


def _share(
    key: str,
    found: dict[int, dict[str, Any]],
    full: dict[int, dict[str, Any]],
    shared: Sequence[int],
) -> str:
    """Per step, against full depth."""
    ratios = []
    for seed in shared:
        ours = found[seed].get("steps") or found[seed]["work"]
        theirs = full[seed]["steps"]
        per_step = (lambda one: one[key] / one["step"]) if key == "train_cpu_s" else itemgetter(key)
        ratios.append(per_step(ours) / per_step(theirs))
    return f"{median(ratios):.2f}"


def _noise(cells: dict[tuple[str, str], dict[int, dict[str, Any]]]) -> float:
    spreads = [
        stdev([one[end]["accuracy"] for one in found.values()])
        for found in cells.values()
        for end in ("steps", "work")
        if len(found) > 1 and all(end in one for one in found.values())
    ]
    return median(spreads) if spreads else 0.0


def _compile_blocks() -> str:
    content = read_values("compile_blocks")
    rows = [
        (
            row["model"],
            row["variant"],
            _ratio(row, "wall_to_not_compiled"),
            _ratio(row, "cpu_to_not_compiled"),
            _seconds(row["first_steps_wall_s"]),
            str(row["graphs"]),
            str(row["graphs_of_other_lengths"]),
            f"{row['gradients_differ_by']:.0e}",
        )
        for row in read_table("compile_blocks")
        if row["graphs"] is not None
    ]
    head = COMPILE_HEAD.format(**content["settings"], place=place(content["machine"]))
    return head + "\n" + markdown_table(COMPILE_COLUMNS, rows)


COMPILE_COLUMNS = (
    "model",
    "compiled",
    "time of a step",
    "CPU time of a step",
    "first 6 steps",
    "graphs",
    "other lengths",
    "gradients, largest difference",
)


def _ratio(row: dict[str, Any], column: str) -> str:
    return f"{row[column]:.3f} ({row[f'{column}_low']:.3f}–{row[f'{column}_high']:.3f})"


def _within(row: dict[str, Any], pairs: int) -> str:
    """Whether a ratio is at most 1.03, as far as its interval says."""
    if pairs < 30:
        return "too few pairs"
    if row["wall_to_sliced_high"] <= 1.03:
        return "yes"
    return "no" if row["wall_to_sliced_low"] > 1.03 else "open"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _bytes(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


TRAFFIC = {
    "upload_bytes": "bytes up",
    "download_bytes": "bytes down",
    "upload_framed_bytes": "framed up",
    "download_framed_bytes": "framed down",
}


def _seconds(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0f} s"
