"""Effective speed of the Jetson profiles, fitted to step times of an earlier test bed.

    python -m benchmarks.clock_calibration.run

Anchors: seconds per step of BERT-base with LoRA in 12 layers, as an earlier test bed of the same
group reported them, without batch and length. Batch 16 and the lengths below are our assumption.
The arithmetic is counted on a model without values, so nothing is downloaded and nothing is
measured here. Writes `study.json`; the profiles in `src/droppeft/costs/device_profiles.py` have
the fitted values to three digits, which a test compares. About 5 seconds.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BertConfig

from benchmarks.study import about, write_values
from droppeft.config import AdapterConfig
from droppeft.costs.fake_step import FakeModel, count_step
from droppeft.costs.step_counts import StepCounts
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec

NAME = "clock_calibration"
BATCH = 16
LENGTHS = {"QQP": 64, "MNLI": 128, "AG News": 256}
ANCHORS_S = {
    "jetson_tx2": {"QQP": 0.81, "MNLI": 2.09, "AG News": 3.42},
    "jetson_xavier_nx": {"QQP": 0.41, "MNLI": 1.10, "AG News": 1.84},
    "jetson_agx_xavier": {"QQP": 0.28, "MNLI": 0.74, "AG News": 1.18},
}


def count(length: int) -> StepCounts:
    """BERT-base with LoRA in its 12 layers, at one length."""
    config = BertConfig()
    spec = adapter_spec(AdapterConfig.model_validate({}), config.num_hidden_layers)
    # The published times are of training with dropout.
    model = FakeModel(config, "classification", spec, backbone_dropout=True)
    return count_step(model, BATCH, length)


def calibrated(flops: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Fit effective FLOP/s and overhead per step (s) to measured step times.

    Least squares of the relative errors, with an overhead that is not negative.

    Args:
        flops: of each step, at least two different values.
        seconds: measured time of each step.

    Raises:
        DroppeftError: the times do not grow with the FLOPs.
    """
    # The relative errors are overhead * ones + x / speed - 1, with ones = 1/y and x = flops/y.
    ones = [1 / each for each in seconds]
    work = [each / took for each, took in zip(flops, seconds, strict=True)]
    mixed, square = float(np.dot(ones, work)), float(np.dot(work, work))
    spread = float(np.dot(ones, ones)) * square - mixed**2
    overhead = max(0.0, (sum(ones) * square - sum(work) * mixed) / spread) if spread else 0.0
    inverse = (sum(work) - overhead * mixed) / square
    if not inverse > 0:
        raise DroppeftError("step times that do not grow with the FLOPs give no effective speed")
    return 1 / inverse, overhead


def fit(anchors_s: dict[str, float], flops: dict[str, int]) -> dict[str, float]:
    """Speed and overhead of one device."""
    speed, overhead = calibrated([flops[data] for data in anchors_s], list(anchors_s.values()))
    return {"effective_flops_per_s": speed, "step_overhead_s": overhead}


def flops_of(counts: StepCounts) -> int:
    """FLOPs of a step in which all layers run."""
    return counts.rest.flops + sum(block.flops for block in counts.blocks)


def quadratic_share(one: StepCounts, double: StepCounts) -> float:
    """Part of a step that is quadratic in its length, from counts at that length and twice it."""
    # F(S) = a S + b S^2, so that F(2S) - 2 F(S) = 2 b S^2.
    work = flops_of(one)
    return (flops_of(double) - 2 * work) / 2 / work


def content() -> dict[str, Any]:
    """All that `docs/reference/device_profiles.md` says of the calibration."""
    counts = {data: count(length) for data, length in LENGTHS.items()}
    layers = len(counts["MNLI"].blocks)
    flops = {data: flops_of(each) for data, each in counts.items()}
    return {
        **about(NAME),
        "model": "BERT-base",
        "layers": layers,
        "batch": BATCH,
        "steps": {data: {"length": LENGTHS[data], "flops": flops[data]} for data in LENGTHS},
        "anchors_s": ANCHORS_S,
        "fits": {name: fit(anchors_s, flops) for name, anchors_s in ANCHORS_S.items()},
        "quadratic_share": quadratic_share(counts["MNLI"], counts["AG News"]),
    }


if __name__ == "__main__":
    made = content()
    write_values(NAME, made)
    print(json.dumps(made, indent=1))
