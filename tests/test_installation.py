"""An sdist and a wheel are built, and droppeft runs from what the wheel installs."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from runs import SETTINGS
from tiny import save_tiny_model

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]

DATA = ("texts.csv.gz", "NOTICE.md", "licences/torch.txt")


def run(*command: str, folder: Path, **environment: str) -> str:
    """Run a Python program and return what it prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    run("-m", "build", "--no-isolation", "--outdir", str(folder), folder=ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed; the libraries are those of this Python."""
    folder = tmp_path_factory.mktemp("installed")
    [wheel] = built.glob("*.whl")
    options = ("--quiet", "--no-deps", "--no-index", "--target", str(folder))
    run("-m", "pip", "install", *options, str(wheel), folder=folder)
    return folder


def test_the_wheel_has_the_texts_and_the_licences(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"droppeft/data/builtin_texts/{name}" for name in DATA} <= names
    assert "droppeft-0.1.0.dist-info/licenses/LICENSE" in names
    assert all(name.startswith(("droppeft/", "droppeft-0.1.0.dist-info/")) for name in names)


def test_the_sdist_has_what_is_needed_to_build(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "constraints.txt", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


def test_it_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    words = [f"model={model}", "data=builtin", *SETTINGS, "rounds=1", "source.max_train_rows=80"]
    command = str(installed / "bin" / "droppeft")
    run(command, "run", *words, "--quiet", folder=tmp_path, PYTHONPATH=str(installed))
    [result] = (tmp_path / "runs").glob("*/result.json")
    assert '"global_accuracy"' in result.read_text(encoding="utf-8")


def test_what_ran_was_the_installed_package(installed: Path, tmp_path: Path) -> None:
    where = "import droppeft; print(droppeft.__file__)"
    found = run("-c", where, folder=tmp_path, PYTHONPATH=str(installed))
    assert Path(found.strip()) == installed / "droppeft" / "__init__.py"
