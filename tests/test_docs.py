"""Generated tables and pages are up to date, and staleness is noticed."""

import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.pages import generate, markdown, markers, reference, studies
from benchmarks.study import read_values
from droppeft.config import build_config, known_keys

BENCHMARKS = generate.ROOT / "docs/benchmarks"
PAGES = sorted(BENCHMARKS.glob("*.md"))
QUESTIONS = [page for page in PAGES if page.stem not in ("index", "setup", "archive")]
ANSWERED = [page for page in QUESTIONS if page.stem != "negative-results"]
"""Pages whose answer is of their own tables."""


def test_the_pages_are_up_to_date() -> None:
    stale = list(generate.stale_pages(generate.ROOT))
    assert stale == [], "run: python -m benchmarks.pages.generate"


def test_pages_need_no_setting_of_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If settings are renamed or removed, results that were made with them give the same tables."""
    for study in sorted(generate.ROOT.glob("benchmarks/*/study.toml")):
        if not study.with_suffix(".json").exists():
            continue  # not run yet
        folder = tmp_path / study.parent.name
        shutil.copytree(study.parent, folder)
        text = (folder / "study.json").read_text(encoding="utf-8")
        renamed = re.sub(r'"[\w.]+=', r'"no.such.setting=', text)
        assert renamed != text
        (folder / "study.json").write_text(renamed, encoding="utf-8")
        (folder / "study.toml").write_text("nonsense = true\n", encoding="utf-8")
    monkeypatch.setattr(studies, "STUDIES", tmp_path)
    assert generate.stale_pages(generate.ROOT) == {}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one page that has a marker."""
    (tmp_path / "docs/benchmarks").mkdir(parents=True)
    (tmp_path / "README.md").write_text("no marker\n", encoding="utf-8")
    (tmp_path / "docs/benchmarks/page.md").write_text(MARKED, encoding="utf-8")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "TABLES", TABLES)
    return tmp_path


MARKED = 'before\n\n<!-- table: twice\nword = "a|b"\n-->\n\nold\n\n<!-- end -->\n\nafter\n'
FILLED = MARKED.replace("old", "| a\\|b | a\\|b |\n| --- | --- |")
TABLES: dict[str, Callable[..., str]] = {
    "twice": lambda word: markdown.markdown_table((word, word), [])
}


def test_a_changed_page_is_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 1
    assert "docs/benchmarks/page.md is stale" in capsys.readouterr().err
    assert generate.main([]) == 0
    assert (root / "docs/benchmarks/page.md").read_text(encoding="utf-8") == FILLED
    assert generate.main(["--check"]) == 0


def test_a_table_changed_by_hand_is_stale(root: Path) -> None:
    assert generate.main([]) == 0
    page = root / "docs/benchmarks/page.md"
    page.write_text(FILLED.replace("a\\|b |\n", "typed by hand |\n"), encoding="utf-8")
    assert list(generate.stale_pages(root)) == ["docs/benchmarks/page.md"]
    page.write_text(FILLED.replace("after", "prose by hand"), encoding="utf-8")
    assert generate.stale_pages(root) == {}


def test_an_unknown_word_is_refused() -> None:
    assert generate.main(["--chek"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: twice -->\n", "has no '<!-- end -->'"),
        ("<!-- table: twice -->\n<!-- table: twice -->\n<!-- end -->", "has no '<!-- end -->'"),
        ("<!-- table: thrice -->\n<!-- end -->", "no table is called 'thrice'; there are: twice"),
    ],
)
def test_a_broken_marker_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        markers.fill(text, TABLES)


@pytest.mark.parametrize("page", ANSWERED, ids=lambda page: page.stem)
def test_an_answer_has_the_figures_of_its_tables(page: Path) -> None:
    """A page begins with its answer, whose decimal numbers occur below it."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)
    answer, _, rest = text.partition("\n\n")[2].partition("\n\n")
    known = set(re.findall(r"\d*\.\d+", rest))
    found = set(re.findall(r"(?<![\d.])\d*\.\d+", answer))
    assert {one.removeprefix("0") for one in found} <= {one.removeprefix("0") for one in known}
    assert page.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_figures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_fit_a_page(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) <= 9, line


def test_the_index_names_every_page() -> None:
    index = (BENCHMARKS / "index.md").read_text(encoding="utf-8")
    assert {*re.findall(r"\]\(([\w-]+)\.md\)", index)} == {page.stem for page in PAGES} - {"index"}
    for page in QUESTIONS:
        title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        assert f"[{title}]({page.name})" in index


def test_contributing_says_how_many_errors_the_sample_of_tests_notices() -> None:
    found = read_values("test_sample")
    [said] = re.findall(r"(\d+) of (\d+) deliberate errors", _words("CONTRIBUTING.md"))
    assert said == (str(found["noticed_by"]["make test"]), str(found["mutations"]))


def _words(page: str) -> str:
    return " ".join((generate.ROOT / page).read_text(encoding="utf-8").split())


def _page(name: str) -> str:
    return (generate.ROOT / f"docs/reference/{name}.md").read_text(encoding="utf-8")


def test_every_setting_has_a_row_with_a_meaning() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.+) \|$", reference.settings(), re.M)
    assert [key for key, _ in rows] == [key for key, _ in known_keys()]


def test_a_row_shows_bounds_default_and_meaning() -> None:
    page = reference.settings()
    assert "| `partition.min_rows` | whole number ≥ 3 | `20` | fewest rows of a client" in page
    assert '| `adapter.targets` | list of texts | `["default"]` | names of modules' in page
    assert "| `adapter.options` | table | `{}` | further settings of the type" in page


def test_every_adapter_type_has_a_row() -> None:
    from droppeft.adapters.types import TYPES

    rows = re.findall(
        r"^\| `(\w+)` \| ", reference.adapter_types() + reference.refused_adapter_types(), re.M
    )
    assert rows == list(TYPES)


def test_a_row_of_a_type_shows_what_was_found() -> None:
    page = reference.adapter_types()
    every = "bert, roberta, deberta-v2, gpt2, llama"
    source = "[arXiv:2106.09685](https://arxiv.org/abs/2106.09685)"
    assert f"| `lora` | LoRA | layered | {source} | 4 | {every} | yes | yes | `rank`" in page
    assert " | bert, roberta, gpt2, llama | yes | yes | `tokens` | " in page
    assert " | bert, roberta, deberta-v2, llama | yes, gpt2 too | – | `rank`, `alpha` | " in page


def test_every_architecture_has_a_row_in_one_of_the_tables() -> None:
    from droppeft.layer_dropout import ARCHITECTURES, REFUSED

    tables = reference.architectures() + reference.refused_architectures()
    rows = re.findall(r"^\| `([\w-]+)`(?:, [^|]+)? \| ", tables, re.M)
    assert list(dict.fromkeys(rows)) == [*ARCHITECTURES, *REFUSED]


def test_a_row_of_an_architecture_shows_what_was_found() -> None:
    page = reference.architectures() + reference.refused_architectures()
    assert "| `bert` | BertModel | `encoder.layer` | its input | sliced | both | yes |  |" in page
    assert "| `t5`, 1.1 | T5Model | `encoder.block`, `decoder.block` | its input and " in page
    assert "| `albert` | it runs the same block at every depth" in page


def test_the_example_is_a_configuration() -> None:
    [example] = re.findall(r"```toml\n(.*?)```", _page("settings"), re.S)
    assert build_config(tomllib.loads(example)).dropout.mean == 0.5


def test_every_profile_has_a_row_and_every_anchor_an_error() -> None:
    from droppeft.costs.device_profiles import PROFILES

    page = reference.device_profiles() + reference.calibration()
    rows = re.findall(r"^\| `(\w+)` \| ", page, re.M)
    assert rows[: len(PROFILES)] == list(PROFILES)
    assert "| `jetson_tx2` | MNLI | 128 | 721 GFLOP | 2.09 s | 1.75 s | -16 % |" in page
    assert "| 1 ± 2.25, within 1–3 MB/s |" in page


def test_the_example_of_a_profile_is_a_configuration() -> None:
    from droppeft.costs.device_profiles import make_fleet

    [example] = re.findall(r"```toml\n(.*?)```", _page("device_profiles"), re.S)
    clock = build_config(tomllib.loads(example)).clock
    assert set(make_fleet(clock, 10, 0).names) == {"watch", "jetson_tx2"}
