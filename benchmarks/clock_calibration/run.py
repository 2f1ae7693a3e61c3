"""Effective speed of the Jetson profiles, fitted to step times of an earlier test bed.

    python -m benchmarks.clock_calibration.run

Anchors: seconds per step of BERT-base with LoRA in 12 layers, as an earlier test bed of the same
group reported them, without batch and length. Batch 16 and the lengths below are our assumption.
The arithmetic is counted on a model without values, so nothing is downloaded and nothing is
measured here. Writes `study.json`; the profiles in `src/droppeft/costs/device_profiles.py` have
the fitted values to three digits, which a test compares. About 5 seconds.
"""

import json
from typing import Any

from transformers import BertConfig

from benchmarks.study import about, write_values
from droppeft.config import AdapterConfig
from droppeft.costs.fake_step import FakeModel, count_step
from droppeft.costs.modelled_clock import calibrated
from droppeft.costs.step_counts import StepCounts, step_flops
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
    return count_step(FakeModel(config, spec), BATCH, length)


def fit(anchors_s: dict[str, float], flops: dict[str, int]) -> dict[str, float]:
    """Speed and overhead of one device."""
    speed, overhead = calibrated([flops[data] for data in anchors_s], list(anchors_s.values()))
    return {"effective_flops_per_s": speed, "step_overhead_s": overhead}


def quadratic_share(one: StepCounts, double: StepCounts) -> float:
    """Part of a step that is quadratic in its length, from counts at that length and twice it."""
    full = [True] * len(one.blocks)
    # F(S) = a S + b S^2, so that F(2S) - 2 F(S) = 2 b S^2.
    work = step_flops(one, full)
    return (step_flops(double, full) - 2 * work) / 2 / work


def content() -> dict[str, Any]:
    """All that `docs/reference/device_profiles.md` says of the calibration."""
    counts = {data: count(length) for data, length in LENGTHS.items()}
    layers = len(counts["MNLI"].blocks)
    flops = {data: step_flops(each, [True] * layers) for data, each in counts.items()}
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
