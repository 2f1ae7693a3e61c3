"""What identifies a run: its settings, data and model, for listeners and for its result. Ours."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from droppeft.adapters.by_layer import count_parameters
from droppeft.client.run_inputs import identity
from droppeft.config import as_tree
from droppeft.layer_dropout import Calibration
from droppeft.methods.droppeft import configured_rates
from droppeft.models.hardware import precision_reason
from droppeft.runs.folder import SETTINGS, bound_settings
from droppeft.server.prepare import Prepared, references
from droppeft.server.privacy_releases import guarantee
from droppeft.tasks.metrics import quality
from droppeft.training.loop import Evaluation

CALIBRATION = "calibration"
"""The fact of a checkpoint that has what each layer is worth, or ``None``."""


def initial_facts(prepared: Prepared, evaluation: Evaluation) -> dict[str, Any]:
    """What is measured once, before round 1, and stored in every checkpoint."""
    calibration = prepared.setup.calibration
    return {
        "initial": dict(evaluation.metrics),
        "label_names": list(prepared.loaded.data.label_names),
        "sampled_test_rows": evaluation.rows,
        "run": prepared.setup.run,
        SETTINGS: bound_settings(prepared.config),
        **identity(prepared.loaded),
        "references": references(prepared.loaded),
        CALIBRATION: None if calibration is None else asdict(calibration),
    }


def calibration_of(facts: Mapping[str, Any]) -> Calibration | None:
    """Return what each layer is worth, as a checkpoint has it; floats are equal bit for bit."""
    known = facts[CALIBRATION]
    return None if known is None else TypeAdapter(Calibration).validate_python(known)


def describe(prepared: Prepared, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a run, for listeners and for the result file."""
    config, data = prepared.config, prepared.loaded.data
    return {
        "task": config.task,
        "metric": prepared.metric.name,
        "method": config.method,
        "method_summary": prepared.method.summary,
        "run": prepared.setup.run,
        "model": config.model,
        "data": config.data,
        "seed": config.seed,
        "clients": config.clients,
        "cohort_size": config.cohort_size,
        "drawn_size": config.drawn,
        "profiles": list(config.clock.profiles),
        "no_clock_reason": prepared.no_clock_reason,
        "precision": precision_reason(config),
        "planned_rounds": config.rounds,
        "num_layers": prepared.setup.num_layers,
        "parameters": prepared.loaded.backbone.parameters,
        "trainable_parameters": _count_trainable(prepared),
        "train_rows": len(data.train),
        "test_rows": len(data.test),
        "classes": len(data.label_names),
        "data_hash": data.content_hash,
        "data_findings": prepared.findings.as_tree(),
        **quality("initial", prepared.loaded.task.metrics, facts["initial"]),
        **facts["references"],
        "sampled_test_rows": len(prepared.sample),
        "privacy": guarantee(config, facts),
        "calibration": _calibration(prepared),
        "config": as_tree(config),
    }


def _calibration(prepared: Prepared) -> dict[str, Any] | None:
    """What each layer is worth, and ``rates``, the drop rates that follow; ``None`` for arms."""
    found, config = prepared.setup.calibration, prepared.config
    if found is None:
        return None
    rates = None
    if config.configurator.policy == "fixed":
        layers, frozen = prepared.setup.num_layers, config.frozen.count
        rates = configured_rates(config.dropout, layers, frozen, found)
    return {**asdict(found), "rates": rates}


def _count_trainable(prepared: Prepared) -> int:
    """Count the values that clients train, including the head.

    A method may leave a part of an adapter untrained.
    """
    trained = prepared.method.evaluate_client(prepared.setup, prepared.state, 1, 0).train
    parameters = prepared.model.parameters
    if trained is None:
        return count_parameters(parameters)
    named = ((name, value) for values in parameters.values() for name, value in values.items())
    return sum(value.numel() for name, value in named if name in trained)
