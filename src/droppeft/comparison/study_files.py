"""Results of a comparison: ``study.json``, and Parquet tables that are read by column name. Ours.

Settings are stored as texts and never parsed, so that results stay readable when settings are
renamed or removed. Settings that pages show have their own columns. A column that a file lacks
reads as ``None``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from droppeft.config import flat
from droppeft.errors import DroppeftError
from droppeft.files import write_atomically
from droppeft.tasks.metrics import METRICS, TEXT_METRICS, primary_metric

SCHEMA_VERSION = 1
STUDY, DEFINITION = "study.json", "study.toml"
RUNS, ROUNDS, CLIENTS = "runs.parquet", "rounds.parquet", "clients.parquet"

OUTCOMES = (
    *("task", "metric"),
    *(one.key(of) for of in ("global", "initial", "personalised") for one in METRICS.values()),
    *("personalised_worst_tenth", "personalised_deviation", "personalised_accuracy_trained"),
    *(one.key("personalised") for one in TEXT_METRICS.values()),
    *("majority_accuracy", "tfidf_accuracy", "own_majority_accuracy"),
    *("round_measured_s", "round_modelled_s", "energy_modelled_j", "idle_modelled_share"),
    *("host_wall_s", "mean_active_layers", "mean_forward_layers", "mean_skipped_layers"),
    *("activation_bytes_peak", "upload_bytes", "download_bytes"),
    *("num_layers", "classes", "train_rows", "test_rows"),
    *("data_hash", "adapter_sha256"),
)
"""Columns of ``runs.parquet`` that ``result.json`` has under the same names."""

SHOWN_SETTINGS = {
    "clients": "clients",
    "cohort_size": "cohort_size",
    "rounds": "rounds",
    "local_steps": "training.local_steps",
    "batch_size": "training.batch_size",
    "schedule": "training.schedule",
    "alpha": "partition.alpha",
    "evaluation_every": "evaluation.every",
    "evaluation_rows": "evaluation.rows",
    "sharing_fraction": "sharing.fraction",
    "policy": "configurator.policy",
    "reward": "configurator.reward",
    "privacy_budget": "privacy.epsilon",
    "delta": "privacy.delta",
    "noise_multiplier": "privacy.noise_multiplier",
    "privacy_clip_norm": "privacy.clip_norm",
}
"""Columns of ``runs.parquet`` with settings that pages show, and the settings' keys."""

OF_A_ROUND = (
    *("round", "accepted", "mean_active_layers", "mean_forward_layers", "mean_skipped_layers"),
    *(metric.key("global") for metric in METRICS.values()),
    *("activation_bytes_peak", "upload_bytes", "download_bytes"),
    *("round_measured_s", "round_modelled_s", "energy_modelled_j"),
    *("coverage", "layer_steps", "importance", "notes", "epsilon"),
)
"""Columns of ``rounds.parquet`` that ``rounds.jsonl`` has too; notes are stored as JSON."""

VARIED = ("seed", "data", "model")
"""Settings that differ between runs; they are columns, and left out of lists of settings."""

WHICH = ("run", "variant", "data", "model", "seed")
"""Columns of ``runs.parquet`` that identify the run."""

NUMBERED = {"machine": "machines", "versions": "versions"}
"""Columns with an index from 0, and the lists of ``study.json`` that they index."""


class Row(dict[str, Any]):
    """A row of a table, by column name; a missing column reads as ``None``."""

    def __missing__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class Target:
    """The quality whose time is asked for: a value, or a variant's last one, worse by ``minus``.

    It is that of the metric, by name; of the task's primary metric if ``None``.
    """

    value: float | None = None
    variant: str | None = None
    minus: float = 0.0
    metric: str | None = None


@dataclass(frozen=True)
class Study:
    """What was compared, as far as it is needed to read the results.

    Attributes:
        variants: their names, in order.
        seeds: of the comparison.
        baseline: the variant with which the others are compared; ``fedlora`` if ``None``, or the
            first one if none has this name.
        target: the quality whose time is asked for, if any.
        definition: text of the comparison's TOML file.
        commands: the command lines that were called.
    """

    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str | None = None
    target: Target | None = None
    definition: str = ""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """The results of a run, or the reason why it has none.

    Attributes:
        folder: name of its folder, unique within the comparison.
        variant, data, model, seed: identify the run.
        settings: all other settings, as ``key=value``.
        result: columns of ``runs.parquet``, ``machine`` and ``versions``; ``None`` if it failed.
        rows: one per round.
        clients: one per client whose own model was evaluated: ``client``, its test ``rows`` and
            value of the task's primary metric, by its name.
        failure: why there is no result; ``None`` if there is one.
    """

    folder: str
    variant: str
    data: str
    model: str
    seed: int
    settings: Sequence[str]
    result: Row | None
    rows: Sequence[Row]
    clients: Sequence[Row]
    failure: str | None

    @property
    def place(self) -> tuple[str, str]:
        """Data and model; quality is comparable only where both are the same."""
        return self.data, self.model


def finished(
    folder: str, variant: str, result: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]
) -> RunRecord:
    """The record of a run that has a result, from ``result.json`` and ``rounds.jsonl``."""
    settings = flat(result["config"])
    outcome = Row(
        {name: result.get(name) for name in OUTCOMES}
        | _generated(result.get("generated"))
        | {name: settings.get(key) for name, key in SHOWN_SETTINGS.items()}
        | {"unmeasured_clients": len(result.get("personalised_failures", ()))}
        | {name: result[name] for name in NUMBERED}
    )
    name = primary_metric(result).name
    clients = [
        Row({"client": one["client"], "rows": one["rows"], name: one[name]})
        for one in result.get("personalised") or ()
    ]
    return RunRecord(
        folder=folder,
        variant=variant,
        data=result["data"],
        model=result["model"],
        seed=result["seed"],
        settings=as_texts(result["config"]),
        result=outcome,
        rows=round_columns(rows),
        clients=clients,
        failure=None,
    )


def _generated(scores: Mapping[str, Any] | None) -> dict[str, float]:
    """Columns with the scores of generated texts, if there are any, as ``chrf_before``."""
    if scores is None:
        return {}
    return {
        f"{name}_{when}": scores[when][name]
        for when in ("before", "after")
        for name in TEXT_METRICS
    }


def round_columns(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The columns of each round that are stored."""
    return [Row({name: row.get(name) for name in OF_A_ROUND}) for row in rows]


def as_texts(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Nested settings as ``key=value`` in TOML, without those of :data:`VARIED`."""
    settings = flat(config).items()
    return tuple(f"{key}={as_toml(value)}" for key, value in settings if key not in VARIED)


def as_toml(value: Any) -> str:
    """A value as it is written in a configuration file, on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def write_tables(out: Path, study: Study, records: Sequence[RunRecord]) -> None:
    """Write a comparison's data, each file atomically; ``study.json`` is written last."""
    _write(out / ROUNDS, [_stored(one.folder, row) for one in records for row in one.rows])
    _write(out / CLIENTS, [{"run": one.folder, **row} for one in records for row in one.clients])
    numbered = {key: _distinct(records, key) for key in NUMBERED}
    _write(out / RUNS, [_run(one, numbered) for one in records])
    write_atomically(out / DEFINITION, study.definition.encode())
    about = {
        "schema_version": SCHEMA_VERSION,
        "date": date.today().isoformat(),
        **{"commands": study.commands, "seeds": study.seeds, "baseline": study.baseline},
        "target": study.target and asdict(study.target),
        **{NUMBERED[key]: known for key, known in numbered.items()},
        **_settings(study.variants, records),
    }
    write_atomically(out / STUDY, (json.dumps(about, indent=1) + "\n").encode())


def _run(one: RunRecord, numbered: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    which = (one.folder, one.variant, one.data, one.model, one.seed)
    row = dict(zip(WHICH, which, strict=True)) | {"failure": one.failure, **(one.result or {})}
    for key, known in numbered.items():
        row[key] = known.index(one.result[key]) if one.result else None
    return row


def _stored(run: str, row: Row) -> dict[str, Any]:
    notes = row["notes"]
    return {"run": run, **row, "notes": notes and json.dumps(notes)}


def _settings(variants: Iterable[str], records: Sequence[RunRecord]) -> dict[str, Any]:
    """Settings that all runs share, and each variant's further ones by data and model."""
    found: dict[tuple[str, str, str], RunRecord] = {}
    for one in sorted(records, key=lambda one: one.result is None):  # failed runs last
        found.setdefault((one.variant, one.data, one.model), one)
    every = [one.settings for one in found.values()]
    common = [setting for setting in every[0] if all(setting in other for other in every)]
    own: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for (variant, data, model), one in found.items():
        rest = [setting for setting in one.settings if setting not in common]
        own[variant].append({"data": data, "model": model, "settings": rest})
    return {"settings": common, "variants": own}


def _distinct(records: Iterable[RunRecord], key: str) -> list[Any]:
    found: list[Any] = []
    for one in records:
        if one.result and one.result[key] not in found:
            found.append(one.result[key])
    return found


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    buffer = pa.BufferOutputStream()
    names = dict.fromkeys(name for row in rows for name in row)  # the first row may lack some
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    compact: dict[str, Any] = {"compression": "zstd", "compression_level": 19}
    pq.write_table(table, buffer, **compact, write_statistics=False)
    write_atomically(path, buffer.getvalue().to_pybytes())


def read_tables(folder: Path) -> tuple[Study, list[RunRecord]]:
    """Read a comparison's data; runs are in the order in which they were written.

    Raises:
        DroppeftError: a file is damaged or missing.
    """
    try:
        return _read(folder)
    except (pa.ArrowException, ValueError, LookupError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DroppeftError(
            f"{folder / STUDY} or a table beside it is damaged ({reason}); repair or remove it"
        ) from None


def _read(folder: Path) -> tuple[Study, list[RunRecord]]:
    about = Row(json.loads((folder / STUDY).read_text(encoding="utf-8")))
    target = Row(about["target"] or {})
    study = Study(
        variants=tuple(about["variants"]),
        seeds=tuple(about["seeds"]),
        baseline=about["baseline"],
        target=Target(target["value"], target["variant"], target["minus"]) if target else None,
        definition=(folder / DEFINITION).read_text(encoding="utf-8"),
        commands=tuple(about["commands"] or ()),
    )
    rounds, clients = _by_run(folder / ROUNDS), _by_run(folder / CLIENTS)
    return study, [_record(row, about, rounds, clients) for row in _rows(folder / RUNS)]


def _record(
    row: Row, about: Row, rounds: Mapping[str, list[Row]], clients: Mapping[str, list[Row]]
) -> RunRecord:
    run, variant, data, model, seed = (row.pop(name) for name in WHICH)
    failure = row.pop("failure", None)
    [own] = [
        one["settings"]
        for one in about["variants"][variant]
        if (one["data"], one["model"]) == (data, model)
    ]
    for key in NUMBERED if failure is None else ():
        row[key] = about[NUMBERED[key]][row[key]]
    rows = rounds.get(run, [])
    for one in rows:
        one["notes"] = one["notes"] and json.loads(one["notes"])
    return RunRecord(
        **{"folder": run, "variant": variant, "data": data, "model": model, "seed": seed},
        settings=(*about["settings"], *own),
        result=None if failure else row,
        rows=rows,
        clients=clients.get(run, []),
        failure=failure,
    )


def _rows(path: Path) -> list[Row]:
    with path.open("rb") as file:  # of a folder, pyarrow would read the files inside
        return [Row(row) for row in pq.read_table(file).to_pylist()]


def _by_run(path: Path) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in _rows(path):
        found.setdefault(row.pop("run"), []).append(row)
    return found
