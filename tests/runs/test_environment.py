"""The versions in a result."""

import importlib.metadata

import pytest

from droppeft import __version__
from droppeft.runs.environment import versions


def test_droppeft_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "droppeft":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = versions()
    assert list(found)[:2] == ["python", "droppeft"]
    assert found["droppeft"] == __version__
    assert found["numpy"] == known("numpy")
