"""The sentences of a comparison's answer, word by word."""

from typing import Any

from droppeft.comparison.answer import answer
from droppeft.comparison.summary import Part, Spread, VariantRow
from droppeft.tasks.metrics import ACCURACY, LOSS, Metric

MB = 1_000_000


def over_seeds(mean: float, deviation: float | None = 0.01) -> Spread:
    return Spread(mean, deviation, 1 if deviation is None else 3)


def a_row(variant: str, seeds: int = 3, **values: Any) -> VariantRow:
    """A variant with accuracies .70, .75 and .80, which reached the target on every seed."""
    names = VariantRow.__dataclass_fields__
    known: dict[str, Any] = {
        "failures": (),
        "metric": ACCURACY,
        "quality": over_seeds(0.75),
        "quality_by_seed": {0: 0.70, 1: 0.75, 2: 0.80},
        "unmeasured": 0,
        "reached": seeds,
        "time_to_target_modelled_s": over_seeds(60.0),
        "speed_up_modelled": 1.0,
        "activation_bytes_peak": 90 * MB,
        "upload_bytes": 20.0 * MB,
        "download_bytes": 20.0 * MB,
        "round_modelled_s": 100.0,
    }
    return VariantRow(
        **{**dict.fromkeys(names), **known, "variant": variant, "seeds": seeds, **values}
    )


def a_part(
    *rows: VariantRow, target: float | None = 0.7, metric: Metric = ACCURACY, **values: Any
) -> Part:
    return Part(
        **{
            **{"data": "d", "model": "m", "metric": metric, "target_metric": metric},
            "baseline": "fedlora",
            **{"target": target, "untrained": {}, "rows": rows},
            **dict.fromkeys(("majority", "tfidf", "own_majority")),
            **values,
        }
    )


FAST = a_row(
    "adaptive",
    quality=over_seeds(0.76),
    quality_by_seed={0: 0.69, 1: 0.78, 2: 0.81},
    time_to_target_modelled_s=over_seeds(31.6),
    speed_up_modelled=1.9,
    activation_bytes_peak=45 * MB,
    upload_bytes=9.0 * MB,
    download_bytes=20.2 * MB,
    round_modelled_s=53.0,
)
WITHOUT_TARGET = {
    "reached": None,
    "time_to_target_modelled_s": None,
    "speed_up_modelled": None,
}
COSTS = (
    "needs 50% of the memory for activations (45.0 MB, measured) "
    "and 73% of the traffic (29.2 MB, measured)."
)


def test_a_target_comes_first() -> None:
    assert answer(a_part(FAST, a_row("fedlora"))) == [
        "adaptive reaches the target (accuracy .700) 1.9 times sooner than fedlora (modelled), "
        "on 3 of 3 seeds.",
        "Accuracy: adaptive .760 ± .010, fedlora .750 ± .010 (adaptive is better on 2 of 3 seeds).",
        f"Compared with fedlora, adaptive {COSTS}",
    ]


def test_other_variants_are_named_by_whether_they_reach_the_target() -> None:
    missed = {"time_to_target_modelled_s": None, "speed_up_modelled": None}
    rows = (
        a_row("fedlora"),
        a_row("fedlora, half", speed_up_modelled=1.5, time_to_target_modelled_s=over_seeds(40)),
        a_row("dropped", **missed, reached=1),
        FAST,
    )
    assert answer(a_part(*rows))[1] == (
        'Also sooner than fedlora: "fedlora, half". Not reached on every seed by '
        "dropped (1 of 3 seeds)."
    )
    many = [a_row(f"dropped {number}", **missed, reached=0) for number in range(5)]
    assert answer(a_part(*rows[:1], *many, FAST))[1] == "Not reached on every seed by 5 variants."


def test_the_baseline_may_be_first_or_alone_or_nobody_reaches_the_target() -> None:
    base = a_row("fedlora")
    slow = a_row("slow", speed_up_modelled=0.5, time_to_target_modelled_s=over_seeds(120.0))
    missed = {"time_to_target_modelled_s": None, "speed_up_modelled": None, "reached": 1}
    late, lost = a_row("slow", **missed), a_row("fedlora", **missed)

    def first(*rows: VariantRow) -> str:
        return answer(a_part(*rows))[0]

    assert first(base, slow) == (
        "fedlora reaches the target (accuracy .700) first; slow takes 2.0 times as long "
        "(modelled), on 3 of 3 seeds."
    )
    assert first(base, a_row("same", speed_up_modelled=0.99)) == (
        "same reaches the target (accuracy .700) about as soon as fedlora (modelled), "
        "on 3 of 3 seeds."
    )
    assert first(base, late) == (
        "Only fedlora reaches the target (accuracy .700) on every seed, after 1 min 00 s "
        "(modelled)."
    )
    assert first(lost, FAST_ALONE) == (
        "adaptive reaches the target (accuracy .700) after 31.6 s (modelled), on 3 of 3 seeds; "
        "fedlora reaches it on 1 of 3 seeds."
    )
    assert first(lost, late) == "No variant reaches the target (accuracy .700) on every seed."


FAST_ALONE = a_row("adaptive", time_to_target_modelled_s=over_seeds(31.6), speed_up_modelled=None)


def test_without_a_target_the_best_quality_comes_first() -> None:
    base = a_row("fedlora", **WITHOUT_TARGET)
    fast = a_row(
        "adaptive",
        **WITHOUT_TARGET,
        quality=over_seeds(0.76),
        quality_by_seed={0: 0.69, 1: 0.78, 2: 0.81},
        round_modelled_s=53.0,
    )
    worse = a_row("worse", **WITHOUT_TARGET, quality=over_seeds(0.5))
    assert answer(a_part(base, worse, fast, target=None)) == [
        "adaptive has the highest accuracy, .760 ± .010; fedlora has .750 ± .010 "
        "(adaptive is better on 2 of 3 seeds).",
        "Compared with fedlora, adaptive needs 53% of the time for the whole run (53.0 s, "
        "modelled), about the same memory for activations (90.0 MB, measured) and about the same "
        "traffic (40.0 MB, measured).",
    ]
    assert answer(a_part(base, worse, target=None))[0] == (
        "fedlora has the higher accuracy, .750 ± .010; worse has .500 ± .010 "
        "(fedlora is better on 0 of 3 seeds)."
    )


def test_losses_of_one_seed_and_texts_on_the_measured_clock() -> None:
    one: dict[str, Any] = {
        **WITHOUT_TARGET,
        **{"seeds": 1, "metric": LOSS, "quality_by_seed": {}},
        **{"activation_bytes_peak": None, "upload_bytes": None, "round_modelled_s": None},
    }
    rows = [
        a_row(
            name,
            **one,
            quality=over_seeds(loss, None),
            rouge_l=over_seeds(0.5, None),
            round_measured_s=seconds,
        )
        for name, loss, seconds in (("fedlora", 1.5, 10.0), ("adaptive", 1.25, 25.0))
    ]
    part = a_part(*rows, target=None, metric=LOSS, untrained={"ROUGE-L": 0.2})
    assert answer(part) == [
        "adaptive has the lower loss, 1.250; fedlora has 1.500.",
        "ROUGE-L of the texts that they write: adaptive .500, fedlora .500, the model before "
        "training .200.",
        "Compared with fedlora, adaptive needs 2.5 times the time for the whole run (25.0 s, "
        "measured).",
        "This is one seed: with another one the order may differ.",
    ]


def test_a_variant_without_a_global_model_is_compared_by_clients_own_models() -> None:
    base = a_row("fedlora", **WITHOUT_TARGET, personalised=over_seeds(0.6))
    alone = a_row(
        "local",
        **WITHOUT_TARGET,
        quality=None,
        quality_by_seed={},
        personalised=over_seeds(0.65),
        upload_bytes=0.0,
        download_bytes=0.0,
    )
    assert answer(a_part(base, alone, target=None)) == [
        "Accuracy: fedlora .750 ± .010.",
        "Accuracy of clients' own models on their own texts: local .650 ± .010, "
        "fedlora .600 ± .010.",
        "Compared with fedlora, local needs about the same time for the whole run (1 min 40 s, "
        "modelled), about the same memory for activations (90.0 MB, measured) and no traffic.",
    ]


def test_failures_leave_an_answer_about_the_others() -> None:
    wrong = a_row("wrong", seeds=0, failures=("lost",), quality=None, reached=0)
    partly = a_row("partly", seeds=2, failures=("lost",))
    *_, last = answer(a_part(a_row("fedlora"), FAST, wrong, partly))
    assert last == "Without a result on every seed: wrong (0 of 3 seeds) and partly (2 of 3 seeds)."
    no_base = a_row("fedlora", seeds=0, failures=("lost",), quality=None, reached=0)
    assert answer(a_part(no_base, FAST)) == [
        "There is no result of fedlora to compare with.",
        "adaptive reaches the target (accuracy .700) after 31.6 s (modelled), on 3 of 3 seeds.",
        "adaptive: accuracy .760 ± .010.",
        "Without a result on every seed: fedlora (0 of 3 seeds).",
    ]
    assert answer(a_part(no_base)) == ["No run has a result."]
    assert answer(a_part(a_row("fedlora", **WITHOUT_TARGET), target=None)) == [
        "fedlora: accuracy .750 ± .010."
    ]
