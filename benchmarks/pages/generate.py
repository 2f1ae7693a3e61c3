"""Write the tables of the documentation that follow from results or from the code.

``python -m benchmarks.pages.generate`` writes them; with ``--check`` it writes nothing and exits
with 1 when one of them is stale. A new table is a function of this folder and a line in `TABLES`.
"""

import sys
from pathlib import Path

from benchmarks.pages import (
    attacks,
    comparisons,
    configurator,
    convergence,
    faults,
    first_studies,
    flower,
    gradient_fidelity,
    language_model_training,
    language_models,
    layer_dropout,
    paired,
    personal_layers,
    predictions,
    privacy,
    recipe,
    reference,
    resources,
    speed,
    studies,
)
from benchmarks.pages.markers import START, Tables, fill

ROOT = Path(__file__).resolve().parents[2]

TABLES: Tables = {
    function.__name__: function
    for function in (
        attacks.attacks,
        attacks.attacks_by_seed,
        attacks.attacks_elsewhere,
        attacks.bounds_compared,
        comparisons.by_data,
        comparisons.by_seed,
        comparisons.comparison,
        comparisons.recommendations,
        comparisons.settings_by_model,
        comparisons.references,
        configurator.configurator_overhead,
        configurator.policies,
        configurator.rewards,
        configurator.simulated_policies,
        convergence.gaps_by_factor,
        convergence.gaps_by_setting,
        convergence.gaps_in_time,
        faults.kills,
        first_studies.first_slice,
        first_studies.head_learning_rate,
        flower.flower_client_round,
        flower.flower_places,
        gradient_fidelity.added_losses,
        gradient_fidelity.gradient_fidelity,
        gradient_fidelity.gradient_merits,
        gradient_fidelity.head_gradients,
        language_model_training.bf16_products,
        language_model_training.completion_loss_costs,
        language_model_training.completion_loss_equality,
        language_model_training.quantised_training,
        language_model_training.quantised_weights,
        language_models.samples,
        layer_dropout.behaviour_of_implementations,
        layer_dropout.compiled_blocks,
        layer_dropout.gates_over_all_rates,
        layer_dropout.other_implementations,
        layer_dropout.peaks,
        layer_dropout.quality,
        layer_dropout.savings_by_rate,
        paired.paired_differences,
        personal_layers.ablation,
        personal_layers.ablation_costs,
        personal_layers.criteria,
        personal_layers.newcomers,
        personal_layers.personalisation,
        personal_layers.scoring_costs,
        personal_layers.sharing_by_skew,
        personal_layers.sharing_on_other_data,
        predictions.predictions,
        predictions.predictors_of_loss,
        predictions.ways_to_drop,
        privacy.differential_privacy,
        privacy.label_inference,
        resources.estimate_errors,
        resources.frozen_layers,
        resources.matrix_kernels,
        resources.memory_savings,
        resources.memory_savings_at_16x128,
        recipe.recipes,
        reference.adapter_types,
        reference.architectures,
        reference.calibration,
        reference.command_line,
        reference.defaults_of_methods,
        reference.defaults_of_tasks,
        reference.device_profiles,
        reference.hostile_server,
        reference.method_descriptions,
        reference.methods,
        reference.node_file,
        reference.odd_inputs,
        reference.refused_adapter_types,
        reference.refused_architectures,
        reference.settings,
        speed.flower_llm_example,
        speed.float32_precision,
        speed.make_run_times,
        speed.start_up_times,
        speed.step_limits,
        speed.trainers,
        speed.waiting_threads,
        speed.worker_throughput,
        studies.runs_table,
    )
}
"""What a marker may name."""


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m benchmarks.pages.generate [--check]", file=sys.stderr)
        return 2
    stale = stale_pages(ROOT)
    if not arguments:
        for name, text in stale.items():
            (ROOT / name).write_text(text, encoding="utf-8")
        return 0
    for name in stale:
        print(f"{name} is stale; run: python -m benchmarks.pages.generate", file=sys.stderr)
    return 1 if stale else 0


def stale_pages(root: Path) -> dict[str, str]:
    """Pages below ``root`` that differ from what they should be, and what that is."""
    found = {}
    for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        name, text = page.relative_to(root).as_posix(), page.read_text(encoding="utf-8")
        if START in text:
            found[name] = (text, _filled(name, text))
    return {name: wanted for name, (text, wanted) in found.items() if text != wanted}


def _filled(name: str, text: str) -> str:
    try:
        return fill(text, TABLES)
    except Exception as error:
        error.add_note(f"in {name}")
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
