"""The profiles follow from the committed calibration, and it follows from the published times."""

from typing import Any

import pytest

from benchmarks.clock_calibration.run import count, fit, flops_of
from benchmarks.study import read_values
from droppeft.costs.device_profiles import PROFILES
from droppeft.costs.modelled_clock import compute_seconds

JETSONS = ("jetson_tx2", "jetson_xavier_nx", "jetson_agx_xavier")


@pytest.fixture(scope="module")
def calibration() -> dict[str, Any]:
    return read_values("clock_calibration")


@pytest.mark.parametrize("name", JETSONS)
def test_a_profile_is_its_fit_to_three_digits(calibration: dict[str, Any], name: str) -> None:
    fit = calibration["fits"][name]
    assert PROFILES[name].effective_flops_per_s == float(f"{fit['effective_flops_per_s']:.2e}")
    assert PROFILES[name].step_overhead_s == round(fit["step_overhead_s"], 3)


def test_the_fits_follow_from_counts_and_anchors(calibration: dict[str, Any]) -> None:
    flops = {data: step["flops"] for data, step in calibration["steps"].items()}
    for name, anchors_s in calibration["anchors_s"].items():
        assert fit(anchors_s, flops) == pytest.approx(calibration["fits"][name])


def test_the_committed_count_is_what_the_model_computes(calibration: dict[str, Any]) -> None:
    counted = count(64)
    assert flops_of(counted) == calibration["steps"]["QQP"]["flops"]


def test_a_count_is_near_what_a_formula_gives(calibration: dict[str, Any]) -> None:
    # BERT-base, forward and backward to the input: twice 2 (4 H^2 + 2 H F) per token and layer,
    # attention 4 S H and twice that. LoRA and head are below 2 %; the lowest layer has a cheaper
    # backward.
    width, inner, layers, length, batch = 768, 3072, 12, 128, 16
    per_token = 2 * 2 * (4 * width**2 + 2 * width * inner) + 3 * 4 * length * width
    counted = calibration["steps"]["MNLI"]["flops"]
    assert counted == pytest.approx(layers * batch * length * per_token, rel=0.03)


@pytest.mark.parametrize("name", JETSONS)
def test_published_times_are_met_within_a_fifth(calibration: dict[str, Any], name: str) -> None:
    for data, anchor in calibration["anchors_s"][name].items():
        flops = calibration["steps"][data]["flops"]
        modelled = compute_seconds(PROFILES[name], flops, steps=1)
        assert modelled == pytest.approx(anchor, rel=0.2)
