"""Generated pages are up to date, and staleness is noticed."""

import importlib.util
import re
import shutil
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from droppeft.config import build_config, known_keys

FOLDER = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(generate: ModuleType) -> None:
    assert generate.stale_pages(FOLDER) == [], "run: python docs/generate.py"
    assert generate.main(["--check"]) == 0


def test_written_pages_are_not_stale(generate: ModuleType, tmp_path: Path) -> None:
    generate.write_pages(tmp_path)
    assert generate.stale_pages(tmp_path) == []


def test_a_missing_or_changed_page_is_stale(
    generate: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    assert generate.main(["--check"]) == 1
    assert list(tmp_path.iterdir()) == []
    assert generate.main([]) == 0
    page = tmp_path / "reference" / "settings.md"
    page.write_text(page.read_text(encoding="utf-8") + "typed by hand\n", encoding="utf-8")
    capsys.readouterr()
    assert generate.main(["--check"]) == 1
    assert "docs/reference/settings.md is stale" in capsys.readouterr().err


def test_pages_need_no_setting_of_today(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If settings are renamed or removed, results that were made with them give the same pages."""
    import tables

    for study in sorted(FOLDER.parent.glob("benchmarks/*/study.toml")):
        folder = tmp_path / study.parent.name
        shutil.copytree(study.parent, folder)
        text = (folder / "study.json").read_text(encoding="utf-8")
        renamed = re.sub(r'"[\w.]+=', r'"no.such.setting=', text)
        assert renamed != text
        (folder / "study.json").write_text(renamed, encoding="utf-8")
        (folder / "study.toml").write_text("nonsense = true\n", encoding="utf-8")
    monkeypatch.setattr(tables, "STUDIES", tmp_path)
    for name in ("../README.md", "convergence.md", "results.md"):
        assert (FOLDER / name).read_text(encoding="utf-8") == generate.PAGES[name]()


def test_an_unknown_word_is_refused(generate: ModuleType) -> None:
    assert generate.main(["--chek"]) == 2


def test_every_setting_has_a_row_with_a_meaning(generate: ModuleType) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.+) \|$", generate.configuration_page(), re.M)
    assert [key for key, _ in rows] == [key for key, _ in known_keys()]


def test_a_row_shows_bounds_default_and_meaning(generate: ModuleType) -> None:
    page = generate.configuration_page()
    assert "| `partition.min_rows` | whole number ≥ 3 | `20` | fewest rows of a client" in page
    assert '| `adapter.targets` | list of texts | `["default"]` | names of modules' in page
    assert "| `adapter.options` | table | `{}` | further settings of the type" in page


def test_every_adapter_type_has_a_row(generate: ModuleType) -> None:
    from droppeft.adapters.types import TYPES

    rows = re.findall(r"^\| `(\w+)` \| ", generate.adapters_page(), re.M)
    assert rows == list(TYPES)


def test_a_row_of_a_type_shows_what_was_found(generate: ModuleType) -> None:
    page = generate.adapters_page()
    every = "bert, roberta, deberta-v2, gpt2, llama"
    source = "[arXiv:2106.09685](https://arxiv.org/abs/2106.09685)"
    assert f"| `lora` | LoRA | layered | {source} | 4 | {every} | yes | yes | `rank`" in page
    assert " | bert, roberta, gpt2, llama | yes | yes | `tokens` | " in page
    assert " | bert, roberta, deberta-v2, llama | yes, gpt2 too | – | `rank`, `alpha` | " in page


def test_every_architecture_has_a_row_in_one_of_the_tables(generate: ModuleType) -> None:
    from droppeft.layer_dropout import ARCHITECTURES, REFUSED

    rows = re.findall(r"^\| `([\w-]+)`(?:, [^|]+)? \| ", generate.architectures_page(), re.M)
    assert list(dict.fromkeys(rows)) == [*ARCHITECTURES, *REFUSED]
    assert f"on the {len(ARCHITECTURES)} model types" in generate.architectures_page()


def test_a_row_of_an_architecture_shows_what_was_found(generate: ModuleType) -> None:
    page = generate.architectures_page()
    assert "| `bert` | BertModel | `encoder.layer` | its input | sliced | both | yes |  |" in page
    assert "| `t5`, 1.1 | T5Model | `encoder.block`, `decoder.block` | its input and " in page
    assert "| `albert` | it runs the same block at every depth" in page


def test_a_bar_does_not_break_a_table(generate: ModuleType) -> None:
    assert generate.markdown_table(("a",), [("x|y",)]) == "| a |\n| --- |\n| x\\|y |\n"


def test_the_example_is_a_configuration(generate: ModuleType) -> None:
    [example] = re.findall(r"```toml\n(.*?)```", generate.configuration_page(), re.S)
    assert build_config(tomllib.loads(example)).dropout.mean == 0.5


def test_every_profile_has_a_row_and_every_anchor_an_error(generate: ModuleType) -> None:
    from droppeft.costs.device_profiles import PROFILES

    page = generate.devices_page()
    rows = re.findall(r"^\| `(\w+)` \| ", page, re.M)
    assert rows[: len(PROFILES)] == list(PROFILES)
    assert "| `jetson_tx2` | MNLI | 128 | 721 GFLOP | 2.09 s | 1.75 s | -16 % |" in page
    assert "| 1 ± 2.25, within 1–3 MB/s |" in page


def test_the_example_of_a_profile_is_a_configuration(generate: ModuleType) -> None:
    from droppeft.costs.device_profiles import make_fleet

    [example] = re.findall(r"```toml\n(.*?)```", generate.devices_page(), re.S)
    clock = build_config(tomllib.loads(example)).clock
    assert set(make_fleet(clock, 10, 0).names) == {"watch", "jetson_tx2"}
