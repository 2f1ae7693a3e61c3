"""Fixtures for all tests: no network, one thread, and one cache folder."""

import gc
import os
import sys
from collections.abc import Callable, Generator, Iterator
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from droppeft.messages.instruction import Instruction
    from droppeft.server.prepare import Prepared
    from runs import Clients

# At module level, since they must be set before torch or transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests must not fail on a slow machine.
settings.register_profile("droppeft", deadline=None, max_examples=50)
settings.register_profile("full", deadline=None, max_examples=1000)
settings.load_profile("droppeft")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Keep the garbage collector from searching what importing the libraries leaves behind."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the mark ``full`` to cases that are not in the sample, and begin with the longest tests.

    Those start Flower; if they came last, one worker would run them while the other is idle.
    """
    cases = [item for item in items if item.get_closest_marker("sample")]
    for _, group in groupby(sorted(cases, key=_function), _function):
        tests = list(group)
        left_out = [test for test in tests if not _is_in_sample(test)]
        # If an edit of the cases left none that matches, the sample has all of them.
        for test in left_out if len(left_out) < len(tests) else ():
            test.add_marker("full")
    items.sort(key=lambda item: "transports" not in item.path.parts)


def _function(test: pytest.Item) -> str:
    return test.nodeid.partition("[")[0]


def _is_in_sample(test: Any) -> bool:
    patterns = test.get_closest_marker("sample").args
    return any(fnmatchcase(test.callspec.id, pattern) for pattern in patterns)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Reset the thread count; tests that need another one set it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of this test run, shared by the workers of pytest-xdist.

    Two workers may write the same entry at once, since cache files are replaced atomically.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "droppeft-cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DROPPEFT_CACHE", str(folder))
        patch.setenv("DROPPEFT_STATE", str(folder / "state"))
        yield folder


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the client states of a test."""
    monkeypatch.setenv("DROPPEFT_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets: DROPPEFT_DATA, or ``../shared/data`` beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DROPPEFT_DATA") or beside)
    if folder.is_dir():
        return folder
    reason = f"no real data in {folder}; set DROPPEFT_DATA"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny_overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run that takes about a second: a tiny model on 180 texts."""
    from runs import SETTINGS, write_tiny_data
    from tiny import save_tiny_model

    model = save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    data = write_tiny_data(tmp_path_factory.mktemp("topics"))
    return [f"model={model}", f"data={data}", *SETTINGS]


@pytest.fixture(scope="session")
def whole_run(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, which tests must only read."""
    from droppeft.config import load_config
    from droppeft.server.run import start_run
    from runs import Recorder

    out = tmp_path_factory.mktemp("whole") / "run"
    start_run(load_config(None, tiny_overrides), out, Recorder())
    return out


@pytest.fixture
def prepare_with(tiny_overrides: list[str]) -> "Callable[..., Prepared]":
    """Function that prepares the tiny run: ``prepare_with("adapter.rank=2")``."""
    from runs import prepared_run

    def make(*overrides: str) -> "Prepared":
        return prepared_run(*tiny_overrides, *overrides)

    return make


@pytest.fixture
def prepared(prepare_with: "Callable[..., Prepared]") -> "Prepared":
    """A run that is ready for round 1."""
    return prepare_with()


@pytest.fixture
def clients(prepared: "Prepared") -> "Clients":
    """All clients of the prepared run, by number."""
    from droppeft.client.run_inputs import clients_of

    return clients_of(prepared.loaded)


@pytest.fixture
def instructions(prepared: "Prepared") -> "list[Instruction]":
    """The instructions of round 1 for three clients."""
    return prepared.method.instruct(prepared.setup, prepared.state, 1, [0, 1, 3])
