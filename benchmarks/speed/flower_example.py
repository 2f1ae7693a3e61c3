"""droppeft against Flower's own example of tuning a language model.

    python -m benchmarks.speed.flower_example FOLDER

`FOLDER` has a port of `examples/flowertune-llm` of Flower to the versions of its packages that are
installed here. It is not part of this repository; docs/benchmarks/speed.md says how to make it. Its
`run.py` gets the path of a JSON file with the settings below, and saves the adapter of the last
round in `out/peft_ROUNDS`.

SmolLM2-135M-Instruct and the prompts of the example; dolly, by the ten clients of its column
`client`; the same rows, clients, rounds, steps, batch size, LoRA and largest learning rate. Both
run two clients at a time on two cores, one thread each. droppeft adds up the gradients of one row
after the other, which needs less memory and no padding. The example does not evaluate, so droppeft
does so once, at the end. Memory is that of all processes together. The loss is that of the same 80
test rows, in fp32, for all adapters. The last arm has the recipe that language models have in
droppeft unless told otherwise (LoRA+), and a single round.

Writes the table `flower_example`. `--only` measures one arm; `--clients`, `--rounds`: less of all.
About half an hour on two cores for ten clients in three rounds.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import torch

from benchmarks.speed.measuring import (
    Rows,
    arguments,
    data_file,
    middle,
    rows_so_far,
    write_part,
)
from benchmarks.speed.processes import EVERY_CORE, rows_of, run_command, run_droppeft
from droppeft.config import load_config
from droppeft.data.conversations import ConversationTable
from droppeft.models.causal_lm import load_causal_lm
from droppeft.models.sources import find_source
from droppeft.tasks.registry import task_named
from droppeft.training.loop import evaluate

PART = "flower_example"
THEIRS, OURS, START = "Flower's example", "droppeft", "before training"
DEFAULT_RECIPE = "droppeft, its own recipe, 1 round"
ORDER = (THEIRS, OURS, DEFAULT_RECIPE, START)
ROWS_OF_A_CLIENT = 100
SIZES = {"steps": 5, "batch_size": 4, "max_length": 512, "learning_rate": 5e-4}
TEMPLATE = """
{%- for message in messages -%}
{%- if message.role == "user" -%}
{{- "Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n### Instruction:\\n" + message.content + "\\n" -}}
{%- elif message.role == "assistant" -%}
{{- "### Response: " + message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "### Response:" -}}
{%- endif -%}
""".strip()  # noqa: E501
"""The words of the example around an instruction and its answer."""

COLUMNS = ("task=causal_lm", "source.prompt=instruction", "source.completion=output")


def prepare(folder: Path, clients: int) -> tuple[Path, Path]:
    """Write the model, with the example's template, and the rows of the clients."""
    model, data = folder / "model", folder / "data"
    shutil.copytree(find_source("smollm2").readable, model)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    data.mkdir()
    source = Path(data_file("dolly15k"))
    columns = ["instruction", "output", "client"]
    train = pq.read_table(source / "train.parquet", columns=columns).to_pandas()
    train = train[train["client"] < clients].groupby("client").head(ROWS_OF_A_CLIENT)
    test = pq.read_table(source / "test.parquet", columns=columns[:2]).to_pandas()
    for name, table in (("train", train), ("test", test)):
        table.to_json(data / f"{name}.jsonl", orient="records", lines=True)
    return model, data


def example(port: Path, folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """Run the example; return what it took, and the folder of its adapter."""
    out = folder / "example"
    out.mkdir()
    asked = {**settings, "data": f"{settings['data']}/train.jsonl", "out": str(out)}
    (folder / "settings.json").write_text(json.dumps(asked), encoding="utf-8")
    words = [sys.executable, str(port / "run.py"), str(folder / "settings.json")]
    took = run_command(words, folder=port, environment=EVERY_CORE)
    row = {"wall_s": took.wall_s, "cpu_s": took.cpu_s, "peak_bytes": took.peak_bytes}
    return row, out / f"peft_{settings['rounds']}"


def ours(
    folder: Path, settings: Mapping[str, Any], *more: str, rounds: int | None = None
) -> tuple[dict[str, Any], Path]:
    """Run droppeft; return what it took, and the folder of its adapter."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "ours"
    rounds = rounds or int(settings["rounds"])
    words = (
        *(*COLUMNS, "method=fedlora", f"model={settings['model']}", f"data={settings['data']}"),
        *("partition.kind=natural", "partition.key=client", f"rounds={rounds}"),
        *(f"clients={settings['clients']}", f"cohort_size={settings['clients']}"),
        *("adapter.rank=32", "adapter.alpha=64", "adapter.dropout=0.075"),
        *(f"training.{key}={SIZES[key]}" for key in ("batch_size", "max_length", "learning_rate")),
        *(f"training.local_steps={SIZES['steps']}", "training.schedule=cosine"),
        *("training.warmup_fraction=0", "training.weight_decay=0", "training.micro_batch_size=1"),
        *(f"evaluation.every={rounds}", "evaluation.rows=8", "evaluation.final_rows=80"),
        *("evaluation.generated=0", "evaluation.personalised=false", "workers=2", *more),
    )
    took = run_droppeft(words, out)
    in_rounds = sum(row["host_wall_s"] for row in rows_of(out, "rounds"))
    row = {"wall_s": took.wall_s, "cpu_s": took.cpu_s, "peak_bytes": took.peak_bytes}
    return {**row, "rounds_wall_s": in_rounds}, out / "adapter"


def test_loss(model: str, data: str, adapter: Path | None) -> float:
    """Loss of a model with an adapter of peft on the test rows, in fp32."""
    backbone = load_causal_lm(model)
    words = [*COLUMNS, f"model={model}", f"data={data}", "training.max_length=512"]
    config = load_config(None, words)
    task = task_named("causal_lm")
    test = task.read(config).test
    assert isinstance(test, ConversationTable)
    table = task.encode(test, backbone.tokenizer, config)
    whole: Any = backbone.model
    if adapter is not None:
        whole = peft.PeftModel.from_pretrained(whole, str(adapter))
    bound = task.on(backbone.inputs, int(backbone.tokenizer.pad_token_id), torch.device("cpu"))
    return evaluate(whole, table, torch.arange(len(table)).numpy(), bound, batch_size=8).loss


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("port", type=Path, help="folder of the ported example")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=(THEIRS, OURS, DEFAULT_RECIPE))
    parser.set_defaults(repeats=1)
    chosen = parser.parse_args()
    sizes = {**SIZES, "clients": chosen.clients, "rounds": chosen.rounds}
    arms: dict[str, Callable[..., tuple[dict[str, Any], Path]]] = {
        THEIRS: partial(example, chosen.port.resolve()),
        OURS: lambda *found: ours(*found, "training.loraplus_lr_ratio=1"),
        DEFAULT_RECIPE: lambda *found: ours(*found, rounds=1),
    }
    rows: Rows = []
    for repeat in range(chosen.repeats):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model, data = prepare(folder, chosen.clients)
            settings = {**sizes, "model": str(model), "data": str(data)}
            for name in [chosen.only] if chosen.only else arms:
                row, adapter = arms[name](folder, settings)
                loss = test_loss(str(model), str(data), adapter)
                rows.append({"variant": name, "repeat": repeat, **row, "test_loss": loss})
                print(rows[-1], flush=True)
            start = test_loss(str(model), str(data), None)
    rows.append({"variant": START, "repeat": 0, "test_loss": start})
    known = {row["variant"] for row in rows}
    rows += [row for row in rows_so_far(PART) if row["variant"] not in known]
    rows.sort(key=lambda row: ORDER.index(row["variant"]))
    if {THEIRS, OURS} <= {row["variant"] for row in rows}:
        for column in ("wall_s", "cpu_s", "peak_bytes"):
            print(column, middle(rows, THEIRS, column) / middle(rows, OURS, column))
    write_part(PART, sizes, rows)


if __name__ == "__main__":
    main()
