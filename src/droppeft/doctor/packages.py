"""Checks of Python and of required, installed and pinned packages, from their metadata; ours.

Only ``packaging`` is imported, which compares versions (PEP 440).
"""

import importlib.metadata
import importlib.util
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import droppeft
from droppeft.doctor.finding import Finding, note, ok, problem

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = Path(droppeft.__file__).parent
DISTRIBUTION = "droppeft"


def check_python() -> Finding:
    """Compare the interpreter with ``requires-python``."""
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return ok(f"{version}, {sys.executable}")
    return problem(f"{version}, wanted {wanted}", "python3.11 -m venv .venv")


def check_dependencies() -> Finding:
    """Check that all direct and indirect requirements are installed in their version ranges.

    An indirect requirement outside its range is only a note, since it may work.
    """
    required = requirements(DISTRIBUTION)
    direct = {each.name: text for each in required if (text := complaint(each))}
    indirect = {
        text: (package, each)
        for package, each in _needed_by(required)
        if (text := complaint(each)) and each.name not in direct
    }
    if not (direct or indirect):
        return ok(f"{len(required)} required packages and their dependencies are installed")
    found = "; ".join(
        [*direct.values(), *(f"{text} for {package}" for text, (package, _) in indirect.items())]
    )
    serious = direct or any(installed(each.name) is None for _, each in indirect.values())
    return problem(found, repair()) if serious else note(found, repair())


def check_pins() -> Finding:
    """Compare installed packages with ``constraints.txt``, whose versions are known to work."""
    from packaging.specifiers import SpecifierSet

    file = constraints_file()
    if file is None:
        return note("this installation has no constraints.txt", repair())
    pins = read_pins(file)
    here = {name: version for name in pins if (version := installed(name))}
    differ = [
        name
        for name, version in here.items()
        if not SpecifierSet(f"=={pins[name]}").contains(version, prereleases=True)
    ]
    if not differ:
        return ok(f"all {len(here)} packages are at the version in constraints.txt")
    versions = ", ".join(f"{name} {here[name]} (pinned {pins[name]})" for name in differ)
    return note(
        f"{len(differ)} of {len(here)} packages differ from constraints.txt: {versions}",
        pip("install", *(f"{name}=={pins[name]}" for name in differ)),
    )


def check_quantization() -> Finding:
    """Check bitsandbytes, which only ``quantization=8bit`` and ``4bit`` need."""
    version = installed("bitsandbytes")
    if version is None:
        return note(
            "bitsandbytes is not installed; only quantization=8bit and 4bit need it",
            repair("[quantization]"),
        )
    return ok(f"bitsandbytes {version}")


def constraints_file() -> Path | None:
    """Find ``constraints.txt``: in the package of a wheel, or at the root of a checkout."""
    checkout = PACKAGE.parents[1]
    candidates = [PACKAGE / "constraints.txt"]
    if (checkout / "pyproject.toml").is_file():
        candidates.append(checkout / "constraints.txt")
    return next((path for path in candidates if path.is_file()), None)


def read_pins(file: Path) -> dict[str, str]:
    """Read versions by package name from lines ``name==version``."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name: version for name, _, version in pairs}


def installed(name: str) -> str | None:
    """The installed version; ``None`` if the package or its metadata is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(name: str) -> "list[Requirement]":
    """The requirements of an installed package on this machine, without extras."""
    from packaging.requirements import Requirement

    parsed = map(Requirement, importlib.metadata.requires(name) or [])
    return [each for each in parsed if not each.marker or each.marker.evaluate({"extra": ""})]


def complaint(requirement: "Requirement") -> str | None:
    """Say how an installed package does not meet a requirement; ``None`` if it does."""
    version = installed(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version}, wanted {requirement.specifier}"
    return None


def _needed_by(packages: "Iterable[Requirement]") -> "Iterator[tuple[str, Requirement]]":
    """Yield (package, requirement) for these packages and for all their dependencies."""
    from packaging.utils import canonicalize_name

    waiting = [canonicalize_name(each.name) for each in packages]
    seen = set(waiting)
    while waiting:
        package = waiting.pop()
        for requirement in requirements(package) if installed(package) else ():
            yield package, requirement
            name = canonicalize_name(requirement.name)
            if name not in seen:
                seen.add(name)
                waiting.append(name)


def repair(extra: str = "") -> str:
    """The command that installs all required packages at versions that are known to work.

    It keeps the installed droppeft and reinstalls only what does not meet its requirements.

    Args:
        extra: an extra of droppeft, in brackets.
    """
    file = constraints_file()
    pinned = ("-c", str(file)) if file else ()
    target = (DISTRIBUTION,) if installed(DISTRIBUTION) else ("-e", str(PACKAGE.parents[1]))
    return pip("install", *pinned, *target[:-1], target[-1] + extra)


def reinstall(name: str, extra: str = "") -> str:
    """The command that reinstalls a package whose files are damaged or of the wrong build.

    Args:
        name: of the package.
        extra: the extra of droppeft that brings it, in brackets; "" if none does.
    """
    return f"{pip('uninstall', '-y', name)} && {repair(extra)}"


def pip(command: str, *arguments: str) -> str:
    """A pip command for this environment, whatever ``pip`` is in the user's shell.

    An environment made by uv has no pip, but then uv is installed.
    """
    if importlib.util.find_spec("pip"):
        return shlex.join([sys.executable, "-m", "pip", command, *arguments])
    return shlex.join(["uv", "pip", command, "--python", sys.executable, *arguments])
