"""Python and the packages: required, installed, pinned; ours, read from the packages' metadata.

Nothing is imported but ``packaging``, which compares versions (PEP 440).
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
    """The interpreter against ``requires-python``."""
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return ok(f"{version}, {sys.executable}")
    return problem(f"{version}, wanted {wanted}", "python3.11 -m venv .venv")


def check_dependencies() -> Finding:
    """Everything required, directly or not, is there; what is required directly is in its range.

    An indirect requirement out of its range is a note: it may work.
    """
    own = requirements(DISTRIBUTION)
    wrong = {each.name: said for each in own if (said := complaint(each))}
    below = {said: (by, each) for by, each in _needed_by(own) if (said := complaint(each))}
    further = {said: why for said, why in below.items() if why[1].name not in wrong}
    if not (wrong or further):
        return ok(f"{len(own)} required packages are installed, and all that these need")
    found = "; ".join([*wrong.values(), *(f"{said} for {by}" for said, (by, _) in further.items())])
    grave = wrong or any(installed(each.name) is None for _, each in further.values())
    return problem(found, repair()) if grave else note(found, repair())


def check_pins() -> Finding:
    """Installed packages against ``constraints.txt``, which is known to work."""
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
        f"other than in constraints.txt, {len(differ)} of {len(here)}: {versions}",
        pip("install", *(f"{name}=={pins[name]}" for name in differ)),
    )


def check_quantization() -> Finding:
    """bitsandbytes, which only ``quantization=8bit`` and ``4bit`` need."""
    version = installed("bitsandbytes")
    if version is None:
        return note(
            "bitsandbytes is not installed; only quantization=8bit and 4bit need it",
            repair("[quantization]"),
        )
    return ok(f"bitsandbytes {version}")


def constraints_file() -> Path | None:
    """``constraints.txt``: a wheel carries it inside the package, a checkout at its root."""
    checkout = PACKAGE.parents[1]
    places = [PACKAGE / "constraints.txt"]
    if (checkout / "pyproject.toml").is_file():
        places.append(checkout / "constraints.txt")
    return next((place for place in places if place.is_file()), None)


def read_pins(file: Path) -> dict[str, str]:
    """Package name to version, of lines ``name==version``."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name: version for name, _, version in pairs}


def installed(name: str) -> str | None:
    """The installed version; ``None`` where there is none, or its metadata is lost."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(name: str) -> "list[Requirement]":
    """What an installed package requires on this machine, without extras."""
    from packaging.requirements import Requirement

    parsed = map(Requirement, importlib.metadata.requires(name) or [])
    return [each for each in parsed if not each.marker or each.marker.evaluate({"extra": ""})]


def complaint(requirement: "Requirement") -> str | None:
    """What is wrong with what is installed for a requirement."""
    version = installed(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version}, wanted {requirement.specifier}"
    return None


def _needed_by(packages: "Iterable[Requirement]") -> "Iterator[tuple[str, Requirement]]":
    """Yield (package, what it requires) for these packages and all that they need in turn."""
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
    """The command that brings all required packages to the versions that are known to work.

    pip takes the droppeft that is installed and mends what it requires.

    Args:
        extra: of droppeft, in brackets.
    """
    file = constraints_file()
    pinned = ("-c", str(file)) if file else ()
    what = (DISTRIBUTION,) if installed(DISTRIBUTION) else ("-e", str(PACKAGE.parents[1]))
    return pip("install", *pinned, *what[:-1], what[-1] + extra)


def reinstall(*names: str) -> str:
    """The command that puts back packages whose files are damaged or of the wrong build."""
    return f"{pip('uninstall', '-y', *names)} && {repair()}"


def pip(command: str, *words: str) -> str:
    """A pip command for this very environment, whatever ``pip`` is in the shell that it meets.

    An environment that uv made has no pip; uv itself comes with Flower.
    """
    if importlib.util.find_spec("pip"):
        return shlex.join([sys.executable, "-m", "pip", command, *words])
    return shlex.join(["uv", "pip", command, "--python", sys.executable, *words])
