"""How close a training step is to its limit, its matrix products and attention alone.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.step_limit [--models MiniLM SmolLM2]

A client's local training (LoRA of rank 8 in all layers, real texts) is recorded once: every product
and every attention, forward and backward, with shapes and types. These operations alone, on tensors
that are there already, are the limit (`products.py`). Both alternate. For the built-in model there
is a third arm, whose blocks are compiled by `torch.compile`.

The Llama has the shape of Llama 3.2 1B, random weights, and the built-in tokenizer.

Writes the table `step_limit`; a model that is measured again replaces its rows. About seven
minutes on one core.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.speed.measuring import (
    Arm,
    Rows,
    alternate,
    arguments,
    data_file,
    middle,
    ratios,
    rows_so_far,
    write_part,
)
from benchmarks.speed.our_training import OurTraining, our_training
from benchmarks.speed.products import Recording
from droppeft.errors import DroppeftError

PART = "step_limit"
OURS, COMPILED, LIMIT = "droppeft", "droppeft, blocks compiled", "products and attention alone"


class Measured(NamedTuple):
    """A model and the size of its local training."""

    words: Sequence[str]
    data: str
    steps: int
    batch_size: int
    compiled: bool = False


CHATS = ("task=causal_lm", "training.learning_rate=0.001")
MODELS = {
    "MiniLM": Measured(("model=builtin",), "ag_news", 8, 16, compiled=True),
    "MPNet": Measured(("model=mpnet", "adapter.targets=q,v"), "ag_news", 3, 16),
    "SmolLM2": Measured(("model=smollm2", *CHATS), "dolly15k", 3, 8),
    "Llama 1B": Measured(
        ("model=config:llama-1b", "training.max_length=128", *CHATS), "dolly15k", 1, 4
    ),
}


def measure(name: str, model: Measured, repeats: int) -> Rows:
    """Rows of a model.

    Raises:
        DroppeftError: the model is not installed.
    """
    training = our_training(model.words, model.steps, model.batch_size)
    training.train()
    with Recording() as recording:
        training.train()
    arms: dict[str, Arm] = {OURS: _trains(training), LIMIT: recording.replay()}
    if model.compiled:
        arms[COMPILED] = _trains(_compiled(model))
    columns = {"model": name, "steps": model.steps, "flops": recording.flops()}
    return alternate(arms, repeats, **columns)


def _trains(training: OurTraining) -> Arm:
    def run() -> dict[str, Any]:
        return {"steps_wall_s": training.train().cost.train_wall_s}

    return run


def _compiled(model: Measured) -> OurTraining:
    """The same training, with each block compiled for batches of any length."""
    training = our_training(model.words, model.steps, model.batch_size)
    training.client.model.attach(training.instruction.adapter)
    for block in training.client.model.blocks:
        vars(block)["forward"] = torch.compile(block.forward, dynamic=True)
    return training


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    chosen = parser.parse_args()
    for name in chosen.models:
        model = MODELS[name]
        words = (*model.words, f"data={data_file(model.data)}")
        try:
            rows = measure(name, model._replace(words=words), chosen.repeats)
        except DroppeftError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        for arm in dict.fromkeys(row["variant"] for row in rows):
            wall, cpu = (ratios(rows, arm, LIMIT, column) for column in ("wall_s", "cpu_s"))
            step_s = middle(rows, arm, "wall_s") / model.steps
            print(
                f"{name}, {arm}: {step_s:.3f} s a step, of the limit {sorted(wall)}, {sorted(cpu)}"
            )
        settings = {key: value._asdict() for key, value in MODELS.items()}
        others = [row for row in rows_so_far(PART) if row["model"] != name]
        write_part(PART, settings, [*others, *rows])


if __name__ == "__main__":
    main()
